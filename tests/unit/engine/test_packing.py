import numpy as np
import pytest
import torch

from esmflow.engine.packing import FRAME, QUERY_BLOCK, fill_packs, full_size, pack_sequences, padded_size
from esmflow.inputs.residues import CLS, EOS, PAD, RESIDUE_TOKEN, RESIDUES


def test_every_sequence_is_in_exactly_one_pack():
    lengths = np.random.default_rng(1).integers(1, 400, 500).tolist()
    packs = fill_packs(lengths, 2048)
    assert sorted(i for pack in packs for i in pack) == list(range(500))


def test_packs_keep_to_the_budget_and_are_nearly_full():
    lengths = np.random.default_rng(2).integers(20, 300, 5000).tolist()
    packs = fill_packs(lengths, 16384)
    tokens = [sum(lengths[i] + FRAME for i in pack) for pack in packs]
    assert max(tokens) <= 16384
    assert np.mean(tokens[:-1]) > 0.98 * 16384


def test_longest_sequences_come_first():
    packs = fill_packs([5, 50, 20, 400], 100)
    assert packs == [[3], [1, 2, 0]]


def test_a_sequence_longer_than_the_budget_is_a_pack_of_its_own():
    assert fill_packs([10, 5000, 10], 100) == [[1], [0, 2]]


def test_no_sequences_make_no_packs():
    assert fill_packs([], 100) == []


def test_a_pack_frames_every_sequence():
    pack = pack_sequences(["MKV", "A"])
    assert pack.tokens.tolist() == [CLS, *(RESIDUE_TOKEN[r] for r in "MKV"), EOS, CLS, RESIDUE_TOKEN["A"], EOS]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert pack.boundaries.tolist() == [0, 5, 8]
    assert pack.blocks.tolist() == [[0, 5, 0], [5, 3, 0]]
    assert pack.runs.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert pack.residue_rows.tolist() == [1, 2, 3, 6]
    assert pack.residues == (3, 1)


def test_every_token_is_in_one_block_of_queries():
    pack = pack_sequences(["M" * 126, "M" * 127, "M", "M" * 500], quantum=16896)
    covered = []
    for start, length, first in pack.blocks.tolist():
        covered.extend(range(start + first, start + min(first + QUERY_BLOCK, length)))
    assert covered == list(range(len(pack.tokens)))


def test_tokens_are_those_of_fair_esm():
    import esm

    _, _, expected = esm.data.Alphabet.from_architecture("ESM-1b").get_batch_converter()([("", RESIDUES)])
    assert torch.equal(pack_sequences([RESIDUES]).tokens, expected[0].int())


def test_the_tail_fills_up_to_a_whole_size_and_is_never_the_longest():
    pack = pack_sequences(["M" * 100, "M" * 900], quantum=16896)
    assert sum(pack.lengths) == len(pack.tokens) == padded_size(1004, 16896) == 1024
    assert pack.longest == 902
    assert (pack.tokens[1004:] == PAD).all()
    assert pack.boundaries[-1] == 1024
    assert pack.runs[-1] == 1004


@pytest.mark.parametrize("quantum", [1, 16896, 13824])
def test_full_sizes_need_no_tail_and_keep_to_the_budget(quantum):
    for budget in [*range(1, 300), 1000, 4096, 16384, 16896, 33792, 65536, 70000, 300000]:
        size = full_size(budget, quantum)
        assert budget * 7 / 8 <= size <= budget
        assert padded_size(size, quantum) == size


def test_tails_are_short():
    for tokens in [*range(1, 3000), 16385, 33000, 67000]:
        assert tokens <= padded_size(tokens, 16896) <= tokens + min(tokens / 8, 16896 / 16)


@pytest.mark.parametrize("strange", ["*", "J", "1", " ", "m", "<", ">", "é", "木", "><"])
def test_a_character_outside_the_alphabet_is_an_error(strange):
    with pytest.raises(ValueError, match="alphabet"):
        pack_sequences(["MKV", f"MK{strange}V"])
