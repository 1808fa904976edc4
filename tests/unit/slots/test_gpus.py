"""Slots: which there are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from workflow_run import PROJECT

from esmflow.slots.cuda_order import cuda_order
from esmflow.slots.gpus import Gpu, SlotError, candidate_slots, driver_gpus, use_slot

SCRIPTS = PROJECT / "workflow" / "scripts"

A, B, C = (Gpu(f"GPU-{i}{i}{i}aaaaa-0000-1111-2222-33334444555{i}", "NVIDIA H100") for i in range(3))
MIG = tuple(Gpu(f"MIG-{n}d0d0d0d-1111-2222-3333-444455556666", "H100 MIG 1g.10gb") for n in range(2))
SPLIT = Gpu(B.uuid, B.name, MIG)


def tokens(value, gpus, device="auto"):
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    return [slot.visible_devices for slot in candidate_slots(device, 2, environment, lambda: gpus, lambda _: None)]


def test_unset_means_every_gpu_of_the_driver_by_uuid():
    assert tokens(None, [A, B, C]) == [A.uuid, B.uuid, C.uuid]


def test_unset_on_a_gpu_in_mig_mode_means_every_instance():
    assert tokens(None, [A, SPLIT]) == [A.uuid, MIG[0].uuid, MIG[1].uuid]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", [A.uuid]),
        ("2,0", [C.uuid, A.uuid]),
        (" 1 , 2 ", [B.uuid, C.uuid]),
        (B.uuid, [B.uuid]),
        ("GPU-222", [C.uuid]),
        (f"{B.uuid},GPU-000", [B.uuid, A.uuid]),
        ("1,1", [B.uuid]),
        (f"1,{B.uuid}", [B.uuid]),
    ],
)
def test_indexes_and_uuids_and_their_beginnings_are_resolved_in_order(value, expected):
    assert tokens(value, [A, B, C]) == expected


# A slow card on the first bus, two fast ones behind it: CUDA counts the fast ones first.
SLOW = Gpu("GPU-00000000-aaaa-0000-0000-000000000000", "NVIDIA T4")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, [B.uuid, SLOW.uuid]),
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, [B.uuid, SLOW.uuid]),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [SLOW.uuid, C.uuid]),
    ],
)
def test_on_unlike_cards_an_index_counts_as_cuda_counts(environment, expected):
    def order(given):
        assert "CUDA_DEVICE_ORDER" not in environment or given["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
        return [B.uuid, C.uuid, SLOW.uuid]

    slots = candidate_slots("auto", 1, {**environment, "CUDA_VISIBLE_DEVICES": "0,2"}, lambda: [SLOW, B, C], order)
    assert [slot.visible_devices for slot in slots] == expected


@pytest.mark.parametrize("told", [None, [], [B.uuid, "GPU-of-another-machine"]])
def test_when_cuda_does_not_tell_its_order_unlike_cards_are_taken_as_the_bus_has_them_with_a_warning(told, caplog):
    slots = candidate_slots("auto", 1, {"CUDA_VISIBLE_DEVICES": "0"}, lambda: [SLOW, B], lambda _: told)
    assert [slot.uuid for slot in slots] == [SLOW.uuid]
    assert "Set CUDA_DEVICE_ORDER=PCI_BUS_ID" in caplog.text
    caplog.clear()
    candidate_slots("auto", 1, {"CUDA_VISIBLE_DEVICES": "0"}, lambda: [A, B], lambda _: told)
    assert caplog.text == ""


def test_cuda_is_not_asked_where_every_gpu_is_named_by_its_uuid():
    def order(_):
        raise AssertionError

    for environment in ({}, {"CUDA_VISIBLE_DEVICES": B.uuid}):
        candidate_slots("auto", 1, environment, lambda: [SLOW, B], order)


def test_without_cuda_there_is_no_order_and_no_error():
    assert cuda_order({**os.environ, "CUDA_VISIBLE_DEVICES": "0"}) is None or driver_gpus()


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["FASTEST_FIRST", "PCI_BUS_ID"])
def test_an_index_means_the_card_that_torch_sees_under_it(order):
    environment = {**os.environ, "CUDA_DEVICE_ORDER": order}
    code = "import torch; print(torch.cuda.get_device_properties(0).uuid)"
    for index in range(len(driver_gpus())):
        environment["CUDA_VISIBLE_DEVICES"] = str(index)
        seen = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        (slot,) = candidate_slots("cuda", 1, environment)
        assert slot.uuid == f"GPU-{seen.stdout.strip()}"
        assert set(cuda_order(environment)) == {gpu.uuid for gpu in driver_gpus()}


def test_mig_uuids_are_resolved_and_an_index_of_a_split_gpu_is_its_first_instance():
    assert tokens(MIG[1].uuid, [A, SPLIT]) == [MIG[1].uuid]
    assert tokens("1", [A, SPLIT]) == [MIG[0].uuid]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0,9,1", [A.uuid]), ("1,-1,0", [B.uuid]), ("2,nonsense,0", [C.uuid]), ("0,GPU-,1", [A.uuid]), ("0,,1", [A.uuid])],
)
def test_what_follows_the_first_invalid_token_is_ignored_as_cuda_does(value, expected):
    assert tokens(value, [A, B, C]) == expected


@pytest.mark.parametrize("value", ["9", "-1", "nonsense", "GPU-ffff"])
def test_no_valid_token_is_an_error_that_lists_what_is_there(value):
    with pytest.raises(SlotError, match=f"{value} names no GPU.*{A.uuid}"):
        tokens(value, [A])


@pytest.mark.parametrize("gpus", [[A], None])
@pytest.mark.parametrize("value", ["", "  "])
def test_set_but_empty_is_an_error_with_a_remedy(value, gpus):
    with pytest.raises(SlotError, match=r"set but empty.*device: cpu"):
        tokens(value, gpus)


def test_device_cuda_without_a_driver_is_an_error():
    with pytest.raises(SlotError, match="lists no GPU"):
        candidate_slots("cuda", 2, {}, lambda: None)


def test_without_a_driver_there_are_as_many_cpu_slots_as_configured():
    slots = candidate_slots("auto", 3, {}, lambda: None)
    assert [slot.token for slot in slots] == ["CPU-0", "CPU-1", "CPU-2"]
    assert {slot.device for slot in slots} == {"cpu"}
    assert {slot.visible_devices for slot in slots} == {""}


def test_on_a_cpu_the_tokens_of_an_allocation_are_the_slots():
    slots = candidate_slots("cpu", 2, {"CUDA_VISIBLE_DEVICES": "2,3"}, driver_gpus)
    assert [(slot.token, slot.device) for slot in slots] == [("2", "cpu"), ("3", "cpu")]


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles", "none"])
def test_on_a_cpu_a_job_that_was_given_no_device_has_the_configured_slots(value):
    slots = candidate_slots("cpu", 2, {"CUDA_VISIBLE_DEVICES": value}, driver_gpus)
    assert [slot.token for slot in slots] == ["CPU-0", "CPU-1"]


def test_two_names_of_one_gpu_are_one_lock():
    by_index, by_uuid = (
        candidate_slots("auto", 1, {"CUDA_VISIBLE_DEVICES": value}, lambda: [A, B], lambda _: None)[0]
        for value in ("1", B.uuid)
    )
    assert by_index.lock_name == by_uuid.lock_name


@pytest.mark.gpu
def test_the_driver_and_torch_agree_on_the_gpus():
    import torch

    assert [gpu.uuid for gpu in driver_gpus()] == [
        f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())
    ]


PRETEND_TORCH = """
import os
class cuda:
    def get_device_properties(number):
        class Properties:
            uuid = os.environ["SEEN"]
        return Properties
"""
USE = """
import sys
from esmflow.slots.gpus import Slot, SlotError, use_slot
try:
    print(use_slot(Slot("0", sys.argv[1], "NVIDIA H100", "cuda")))
except SlotError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("leased", "seen", "said"),
    [
        ("GPU-aaaa", "aaaa", "'visible_devices': 'GPU-aaaa', 'seen_uuid': 'GPU-aaaa'"),
        ("GPU-aaaa", "bbbb", "this worker sees another GPU: GPU-bbbb, with CUDA_VISIBLE_DEVICES=GPU-aaaa"),
        ("MIG-aaaa", "bbbb", "'visible_devices': 'MIG-aaaa'"),
    ],
)
def test_a_worker_that_sees_another_card_than_the_one_leased_does_no_work(tmp_path, leased, seen, said):
    # No machine has cards to mix up at will: torch is a pretence that says what it sees.
    (tmp_path / "torch.py").write_text(PRETEND_TORCH)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{SCRIPTS}", "SEEN": seen, "CUDA_VISIBLE_DEVICES": "0"}
    used = subprocess.run([sys.executable, "-c", USE, leased], env=environment, capture_output=True, text=True)
    assert said in used.stdout, used.stderr


def test_a_slot_is_not_used_once_torch_is_there():
    import torch  # noqa: F401

    (slot,) = candidate_slots("cpu", 1, {}, lambda: None)
    with pytest.raises(RuntimeError, match="torch was imported before"):
        use_slot(slot)
