"""Whatever a sequence or the memory does, every sequence ends as a row or a failure, and the others do not notice."""

import errno
import gc
import json
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from made_up import proteins, random_model, relative_error, with_digests, write_converted

from esmflow.arrays import INCLUDE, Array, Outputs
from esmflow.engine import extraction
from esmflow.engine.extraction import extract_esm_features
from esmflow.engine.fair_esm import ReferenceEngine
from esmflow.engine.memory import is_out_of_memory
from esmflow.engine.packed import PackedEngine
from esmflow.engine.weights import Weights
from esmflow.failures import Reason
from esmflow.inputs.residues import sequence_digest
from esmflow.method import LongSequences

EVERYTHING = ("mean", "bos", "per_residue")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_converted(tmp_path_factory.mktemp("checkpoint") / "a.safetensors", random_model(2, 32, 2))


@pytest.fixture
def engine(checkpoint):
    return ReferenceEngine.load(str(checkpoint), Outputs((0, 2), EVERYTHING), "fp32", "cpu")


def by_digest(segment) -> dict[bytes, dict[str, np.ndarray]]:
    """The arrays of each sequence."""
    offsets = segment.offsets("per_residue_layer6")
    found = {}
    for row, digest in enumerate(segment.digests):
        found[digest.tobytes()] = {
            name: values[offsets[row] : offsets[row + 1]] if name.startswith("per_residue") else values[row]
            for name, values in segment.arrays.items()
        }
    return found


def assert_same_vectors(found, expected, sequences) -> None:
    for sequence in sequences:
        ours, theirs = found[sequence_digest(sequence)], expected[sequence_digest(sequence)]
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            assert values.shape == theirs[name].shape
            assert relative_error(values, theirs[name]) < 1e-5


def assert_accounted_for(result, sequences) -> None:
    """Every sequence is a row or a failure, and none is both."""
    rows = [digest.tobytes().hex() for digest in result.segment.digests]
    failed = [failure.digest for failure in result.segment.failures]
    assert sorted(rows + failed) == sorted(sequence_digest(s).hex() for s in sequences)
    lengths = {sequence_digest(s).hex(): len(s) for s in sequences}
    assert [lengths[digest] for digest in rows] == result.segment.lengths.tolist()


class SmallCard(ReferenceEngine):
    """Runs out of memory, as torch says it, above so many padded tokens at a time."""

    capacity = 0
    raises_in = "launch"
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def launch(self, prepared):
        if self.raises_in == "launch" and prepared[0].numel() > self.capacity:
            raise self.error
        return super().launch(prepared), prepared[0].numel()

    def fetch(self, launched):
        launched, tokens = launched
        if self.raises_in == "fetch" and tokens > self.capacity:
            raise self.error
        return super().fetch(launched)

    @classmethod
    def like(cls, engine: ReferenceEngine, capacity: int, raises_in: str = "launch") -> "SmallCard":
        card = cls(engine.model, engine.outputs, engine.precision, engine.device)
        card.capacity, card.raises_in = capacity, raises_in
        return card


# What an extraction gives


def test_every_sequence_is_one_row_with_all_arrays(engine):
    sequences = proteins(50, 1, 60)
    result = extract_esm_features(with_digests(set(sequences)), engine, 256)
    segment = result.segment
    assert_accounted_for(result, set(sequences))
    assert segment.failures == ()
    assert segment.precision == "fp32"
    assert list(segment.arrays) == engine.outputs.names()
    residues = sum(len(s) for s in set(sequences))
    for name, values in segment.arrays.items():
        assert values.dtype == np.float32
        assert values.shape == ((residues if name.startswith("per_residue") else len(segment)), 32)
    assert result.token_budget == 256


def test_the_budget_changes_no_vector(engine):
    sequences = list(dict.fromkeys(proteins(40, 1, 100)))
    expected = by_digest(extract_esm_features(with_digests(sequences), engine, 1).segment)
    for budget in (150, 10_000):
        found = by_digest(extract_esm_features(with_digests(sequences), engine, budget).segment)
        assert_same_vectors(found, expected, sequences)


def test_nothing_to_embed_is_an_empty_segment(engine):
    result = extract_esm_features([], engine, 2048)
    assert len(result.segment) == 0
    assert result.segment.digests.shape == (0, 16)
    assert result.segment.failures == ()


def test_a_long_sequence_is_truncated_to_its_first_residues(engine):
    long, short = proteins(1, 90, 90)[0], "MKVLAG"
    result = extract_esm_features(with_digests([long, short]), engine, 2048, long=LongSequences(20))
    found = by_digest(result.segment)
    alone = by_digest(extract_esm_features([(sequence_digest(long), long[:20])], engine, 2048).segment)
    assert_same_vectors(found, alone, [long])
    lengths = dict(zip((d.tobytes() for d in result.segment.digests), result.segment.lengths.tolist()))
    assert lengths == {sequence_digest(long): 20, sequence_digest(short): 6}
    assert found[sequence_digest(long)]["per_residue_layer2"].shape == (20, 32)


def test_without_a_limit_a_sequence_is_embedded_whole(engine):
    (long,) = proteins(1, 1500, 1500)
    result = extract_esm_features(with_digests([long]), engine, 100)
    assert result.segment.lengths.tolist() == [1500]
    assert result.segment.arrays["per_residue_layer2"].shape == (1500, 32)


@pytest.mark.parametrize("capacity", [10**9, 200, 40, 0])
def test_progress_adds_up_to_all_residues_whatever_happens(engine, capacity):
    sequences = list(dict.fromkeys(proteins(15, 1, 80)))
    told = []
    card = SmallCard.like(engine, capacity)
    extract_esm_features(with_digests(sequences), card, 400, long=LongSequences(60), on_progress=told.append)
    assert sum(told) == sum(min(len(s), 60) for s in sequences)
    assert len(told) > 1


# Out of memory


@pytest.mark.parametrize("raises_in", ["launch", "fetch"])
def test_the_budget_is_halved_until_batches_fit_and_no_vector_changes(engine, raises_in):
    sequences = list(dict.fromkeys(proteins(60, 20, 90)))
    expected = by_digest(extract_esm_features(with_digests(sequences), engine, 4096).segment)
    result = extract_esm_features(with_digests(sequences), SmallCard.like(engine, 600, raises_in), 4096)
    assert result.segment.failures == ()
    assert_accounted_for(result, sequences)
    assert_same_vectors(by_digest(result.segment), expected, sequences)
    # 4096, 2048, 1024 and then 512, which fits; two batches that are under way together may both ask for less.
    assert result.token_budget in ({512} if raises_in == "launch" else {512, 256})


@pytest.mark.parametrize("raises_in", ["launch", "fetch"])
def test_one_that_does_not_fit_alone_is_a_failure_and_the_others_are_embedded(engine, raises_in):
    sequences = list(dict.fromkeys([*proteins(20, 10, 50), *proteins(2, 200, 220), *proteins(20, 10, 50, 1)]))
    giants = [s for s in sequences if len(s) >= 200]
    others = [s for s in sequences if len(s) < 200]
    expected = by_digest(extract_esm_features(with_digests(others), engine, 1024).segment)
    result = extract_esm_features(with_digests(sequences), SmallCard.like(engine, 100, raises_in), 1024)
    assert_accounted_for(result, sequences)
    assert_same_vectors(by_digest(result.segment), expected, others)
    assert {f.digest for f in result.segment.failures} == {sequence_digest(s).hex() for s in giants}
    for failure in result.segment.failures:
        assert failure.reason == Reason.OUT_OF_MEMORY
        assert "residues do not fit into memory alone: CUDA out of memory" in failure.detail


class SharedCard(ReferenceEngine):
    """Runs out of memory above so many tokens of all batches that are under way together."""

    capacity = 0
    used = 0

    def launch(self, prepared):
        tokens = prepared[0].numel()
        if self.used + tokens > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        self.used += tokens
        return super().launch(prepared), tokens

    def fetch(self, launched):
        launched, tokens = launched
        self.used -= tokens
        return super().fetch(launched)


def test_one_that_does_not_fit_beside_another_is_tried_alone_and_embedded(engine):
    sequences = list(dict.fromkeys([*proteins(6, 100, 100), *proteins(3, 150, 150), *proteins(10, 5, 20)]))
    expected = by_digest(extract_esm_features(with_digests(sequences), engine, 1).segment)
    card = SharedCard(engine.model, engine.outputs, engine.precision, engine.device)
    card.capacity = 152
    told = []
    result = extract_esm_features(with_digests(sequences), card, 152, on_progress=told.append)
    assert result.segment.failures == ()
    assert_accounted_for(result, sequences)
    assert_same_vectors(by_digest(result.segment), expected, sequences)
    assert sum(told) == sum(map(len, sequences))


def test_no_memory_at_all_makes_every_sequence_a_failure(engine):
    sequences = list(dict.fromkeys(proteins(10, 5, 50)))
    result = extract_esm_features(with_digests(sequences), SmallCard.like(engine, 0), 1024)
    assert_accounted_for(result, sequences)
    assert len(result.segment) == 0
    assert {f.reason for f in result.segment.failures} == {Reason.OUT_OF_MEMORY}
    assert result.token_budget >= 1


def test_an_error_that_is_not_about_memory_is_raised(engine):
    card = SmallCard.like(engine, 100)
    card.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        extract_esm_features(with_digests(proteins(5, 200, 210)), card, 1024)


def test_a_letter_that_was_not_rejected_before_is_raised_and_no_result_is_made_up(engine):
    with pytest.raises(KeyError, match="J"):
        extract_esm_features(with_digests(["MKJV"]), engine, 1024)


def test_every_kind_of_running_out_of_memory_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


SHORTAGES = (
    # Of a library that allocates on its own, of the driver (for page-locked memory too), of C++ and of the system.
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
)
OTHER_ERRORS = (
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    KeyError("out of memory"),
)


@pytest.mark.parametrize("error", SHORTAGES, ids=str)
def test_a_shortage_is_one_whoever_reports_it(engine, error):
    assert is_out_of_memory(error)
    sequences = list(dict.fromkeys(proteins(20, 20, 60)))
    card = SmallCard.like(engine, 200)
    card.error = error
    result = extract_esm_features(with_digests(sequences), card, 1000)
    assert result.segment.failures == ()
    assert_accounted_for(result, sequences)


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=str)
def test_what_is_no_shortage_of_memory_is_not_taken_for_one(error):
    assert not is_out_of_memory(error)


EXTRACT_IN_LITTLE_MEMORY = """
import json, re, resource, sys
from pathlib import Path
import numpy as np, torch
from esmflow.arrays import INCLUDE, Array, Outputs
from esmflow.engine.extraction import extract_esm_features
from esmflow.inputs.residues import sequence_digest
from esmflow.engine.fair_esm import ReferenceEngine

torch.set_num_threads(1)
checkpoint, limit = sys.argv[1], int(sys.argv[2])
engine = ReferenceEngine.load(checkpoint, Outputs((2,), ("mean",)), "fp32", "cpu")
random = np.random.default_rng(0)
sequences = ["".join(random.choice(list("LAGVSERTIDPKQNFY"), n)) for n in [300] * 12 + [4000]]
extract_esm_features([(b"0" * 16, "MKV")], engine, 100)
if limit:
    size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + limit, size + limit))
result = extract_esm_features([(sequence_digest(s), s) for s in sequences], engine, 12 * 302)
segment = result.segment
vectors = {d.tobytes().hex(): v.tolist() for d, v in zip(segment.digests, segment.arrays["mean_layer2"])}
failures = [(f.reason.value, f.detail) for f in segment.failures]
print(json.dumps({"vectors": vectors, "failures": failures, "budget": result.token_budget}))
"""


def test_running_out_of_memory_for_real_loses_only_what_does_not_fit(checkpoint):
    """The allocator itself refuses: the process may take so much address space and no more."""

    def run(limit: int) -> dict:
        command = [sys.executable, "-c", EXTRACT_IN_LITTLE_MEMORY, checkpoint, str(limit)]
        environment = {**os.environ, "PYTHONPATH": str(extraction.__file__).rsplit("/", 3)[0]}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    free, limited = run(0), run(8_000_000)
    assert free["failures"] == []
    assert len(free["vectors"]) == 13
    assert free["budget"] == 12 * 302
    ((reason, detail),) = limited["failures"]
    assert reason == "out_of_memory"
    assert detail.startswith("4000 residues do not fit into memory alone")
    assert limited["budget"] < 12 * 302
    assert len(limited["vectors"]) == 12
    for digest, vector in limited["vectors"].items():
        assert relative_error(np.array(vector), np.array(free["vectors"][digest])) < 1e-5


# NaN and infinity


@pytest.fixture(scope="module")
def engine_with_nan_for_pyrrolysine(tmp_path_factory):
    """A damaged checkpoint: the embedding of residue O is NaN."""
    model = random_model(2, 32, 2)
    with torch.no_grad():
        model.embed_tokens.weight[model.alphabet.get_idx("O")] = float("nan")
    path = write_converted(tmp_path_factory.mktemp("nan") / "a.safetensors", model)
    return ReferenceEngine.load(str(path), Outputs((0, 2), EVERYTHING), "fp32", "cpu")


@pytest.mark.parametrize("budget", [1, 300, 10_000], ids=["alone", "in batches", "all in one batch"])
def test_only_the_sequences_with_nan_are_failures(engine_with_nan_for_pyrrolysine, budget):
    good = list(dict.fromkeys(proteins(20, 5, 60)))
    bad = [f"{s}O" for s in good[:3]] + ["O", "MOKV"]
    mixed = [s for pair in zip(good, [*bad, *good]) for s in pair]
    sequences = list(dict.fromkeys(mixed + good))
    expected = by_digest(extract_esm_features(with_digests(good), engine_with_nan_for_pyrrolysine, 1).segment)
    result = extract_esm_features(with_digests(sequences), engine_with_nan_for_pyrrolysine, budget)
    assert_accounted_for(result, sequences)
    assert {f.digest for f in result.segment.failures} == {sequence_digest(s).hex() for s in bad}
    assert {f.reason for f in result.segment.failures} == {Reason.NON_FINITE}
    assert result.segment.failures[0].detail == "NaN or infinity in fp32 and in fp32"
    assert_same_vectors(by_digest(result.segment), expected, good)
    assert all(np.isfinite(values).all() for values in result.segment.arrays.values())


def test_a_non_finite_value_in_any_array_is_noticed(engine_with_nan_for_pyrrolysine):
    engine = engine_with_nan_for_pyrrolysine
    sequences = ["MKVLAG", "MKVLAO"]
    # In layer 0 neither cls nor the other residues know of the last one.
    for include, failures in ((("bos",), 0), (("per_residue",), 1), (("mean",), 1), (("bos", "mean"), 1)):
        narrow = ReferenceEngine(engine.model, Outputs((0,), include), "fp32", engine.device)
        result = extract_esm_features(with_digests(sequences), narrow, 1000)
        assert len(result.segment.failures) == failures


class SpoiltEngine(ReferenceEngine):
    """The real engine, but for one value of one array of every sequence of this length, which is NaN."""

    array, column, length = "", 0, 0

    def fetch(self, launched):
        arrays, lengths = super().fetch(launched), launched[1]
        if self.length in lengths:
            after = Array.named(self.array).offsets(np.array(lengths))[lengths.index(self.length) + 1]
            arrays[self.array] = arrays[self.array].copy()
            arrays[self.array][(after - 1, *([self.column] if arrays[self.array].ndim > 1 else []))] = np.nan
        return arrays


@pytest.mark.parametrize("column", [1, 17, 31])
@pytest.mark.parametrize("array", Outputs((0, 2), INCLUDE).names())
def test_one_value_that_is_not_finite_is_noticed_in_whatever_column_of_whatever_array(
    checkpoint, array, column, monkeypatch
):
    engine = SpoiltEngine.load(str(checkpoint), Outputs((0, 2), INCLUDE), "fp32", "cpu")
    sequences = [*proteins(8, 5, 9), "MKVLAGWYTRED"]
    # Of the class: the engine that tries again in fp32 is another one.
    for name, value in {"array": array, "column": column, "length": 12}.items():
        monkeypatch.setattr(SpoiltEngine, name, value)
    result = extract_esm_features(with_digests(sequences), engine, 60)
    assert [failure.digest for failure in result.segment.failures] == [sequence_digest(sequences[-1]).hex()]
    assert result.segment.failures[0].reason == Reason.NON_FINITE
    assert len(result.segment) == len(set(sequences)) - 1
    assert all(np.isfinite(values).all() for values in result.segment.arrays.values())


def overflowing_model():
    """A model in which residue W, and no other, drives one hidden unit beyond what fp16 can hold."""
    model = random_model(2, 32, 2)
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    with torch.no_grad():
        model.embed_tokens.weight[model.alphabet.get_idx("W")] = 1000 * direction
        layer = model.layers[0]
        layer.final_layer_norm.weight.fill_(1)
        layer.final_layer_norm.bias.fill_(0)
        # For W the norm gives direction · √32: 1000 · 5.6 - 4000 > 0. For others it is about 1 and GELU gives 0.
        layer.fc1.weight[7] = 1000 * direction
        layer.fc1.bias[7] = -4000
        layer.fc2.weight[:, 7] = 100
    return model


@pytest.fixture(scope="module")
def overflowing_checkpoint(tmp_path_factory):
    return write_converted(tmp_path_factory.mktemp("overflow") / "a.safetensors", overflowing_model())


def test_what_overflows_in_fp16_is_embedded_in_fp32(overflowing_checkpoint):
    outputs = Outputs((1, 2), EVERYTHING)
    half, exact = (ReferenceEngine.load(str(overflowing_checkpoint), outputs, p, "cpu") for p in ("fp16", "fp32"))
    good = list(dict.fromkeys(proteins(12, 10, 60, letters="LAGVSERTIDPKQNFYMHC")))
    bad = [f"{s}W" for s in good[:4]]
    # The premise: in fp16 these overflow, and no others.
    for sequence in good + bad:
        arrays = half.fetch(half.launch(half.prepare([sequence])))
        assert np.isfinite(arrays["mean_layer1"]).all() == (sequence in good)

    sequences = [s for pair in zip(bad, good) for s in pair] + good[4:]
    result = extract_esm_features(with_digests(sequences), half, 2000)
    assert_accounted_for(result, sequences)
    assert result.segment.failures == ()
    assert result.segment.precision == "fp16"
    found = by_digest(result.segment)
    in_fp32 = by_digest(extract_esm_features(with_digests(bad), exact, 2000).segment)
    assert_same_vectors(found, in_fp32, bad)
    alone = by_digest(extract_esm_features(with_digests(good), half, 1).segment)
    for sequence in good:
        for name, values in found[sequence_digest(sequence)].items():
            assert relative_error(values, alone[sequence_digest(sequence)][name]) < 1e-2


def test_what_is_not_finite_and_then_does_not_fit_is_a_failure_for_memory(overflowing_checkpoint):
    half = ReferenceEngine.load(str(overflowing_checkpoint), Outputs((2,), ("mean",)), "fp16", "cpu")

    class NoRoomForFp32(ReferenceEngine):
        @contextmanager
        def at_full_precision(self):
            with super().at_full_precision() as exact:
                yield SmallCard.like(exact, 0)

    engine = NoRoomForFp32(half.model, half.outputs, half.precision, half.device)
    result = extract_esm_features(with_digests(["MKVLAGW", "MKVLAG"]), engine, 2000)
    (failure,) = result.segment.failures
    assert (failure.digest, failure.reason) == (sequence_digest("MKVLAGW").hex(), Reason.OUT_OF_MEMORY)
    assert failure.detail.startswith("NaN or infinity in fp16, and no memory to embed it in fp32")
    assert len(result.segment) == 1


def weights_in_memory() -> list[Weights]:
    """Of all packed engines that are there."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is Weights]


def test_weights_in_fp32_and_in_16_bits_are_never_in_memory_together_and_those_in_fp32_do_not_stay(
    overflowing_checkpoint, monkeypatch
):
    # Other tests of this process may have engines that stay.
    others = weights_in_memory()

    def precisions_in_memory() -> list[torch.dtype]:
        return [w.embedding.dtype for w in weights_in_memory() if not any(w is other for other in others)]

    engine = PackedEngine.load(overflowing_checkpoint, Outputs((1, 2), EVERYTHING), "fp16", "cpu")
    exact = PackedEngine.load(overflowing_checkpoint, Outputs((1, 2), EVERYTHING), "fp32", "cpu")
    good = list(dict.fromkeys(proteins(12, 10, 60, letters="LAGVSERTIDPKQNFYMHC")))
    bad = [f"{s}W" for s in good[:4]]
    in_fp32 = by_digest(extract_esm_features(with_digests(bad), exact, 2000).segment)
    in_fp16 = by_digest(extract_esm_features(with_digests(good), engine, 2000).segment)
    del exact
    seen = []
    launch = PackedEngine.launch

    def launch_and_look(self, prepared):
        launched = launch(self, prepared)
        seen.append((self.precision, precisions_in_memory()))
        return launched

    monkeypatch.setattr(PackedEngine, "launch", launch_and_look)
    result = extract_esm_features(with_digests([*bad, *good]), engine, 2000)
    assert result.segment.failures == ()
    assert {precision for precision, _ in seen} == {"fp16", "fp32"}
    for precision, in_memory in seen:
        assert in_memory == [torch.float16 if precision == "fp16" else torch.float32]
    assert torch.float32 not in precisions_in_memory()
    assert_same_vectors(by_digest(result.segment), in_fp32, bad)
    # The weights of 16 bits are read again when they are needed.
    again = by_digest(extract_esm_features(with_digests(good), engine, 2000).segment)
    assert_same_vectors(again, in_fp16, good)
