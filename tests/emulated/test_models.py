"""The flag protocols of the kernels as Promela models, all of whose states spin searches.

Clean models hold: nobody reads a slot or a packet that is not what it takes it for, and every
block comes to its end. Each planted fault is found. Spin is sequentially consistent: orders and
scopes are the part of ThreadSanitizer and of the lint of the PTX.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "models"))

import model
from model import Operation

pytestmark = pytest.mark.skipif(
    bool(model.missing()), reason=f"models need {model.missing()} (apt-get install spin gcc)"
)

CAMPAIGN_LIMIT_S = 600
RING, TWO_SHOT, ONE_SHOT = Operation("ring"), Operation("two_shot"), Operation("one_shot")
RING_2 = Operation("ring", rounds=2)
TREE = Operation("double_tree", rounds=2, lanes=(0, 1))
OTHER_TREE = Operation("double_tree", lanes=(2, 3))
# Rank 0 has an operation that the others have not; both go on with the same one.
DISAGREE: dict[str, Any] = {
    "operations": [Operation("ring", tag=1), TWO_SHOT],
    "others": [TWO_SHOT, TWO_SHOT],
}


@dataclass(frozen=True)
class Case:
    """Arguments of model.blocks()."""

    name: str
    world: int
    slots: int
    operations: list[Operation]
    options: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        return model.blocks(self.world, self.slots, self.operations, **self.options)


def aborted(name: str, world: int, slots: int, operations: list[Operation], **more: Any) -> Case:
    """Every rank is aborted, each at any time."""
    return Case(name, world, slots, operations, {"aborts": range(world), **more})


RING_ABORTED = aborted("ring_aborted", 3, 2, [RING, RING])
RANKS_DISAGREE = aborted("ranks_disagree", 3, 2, **DISAGREE)
CLEAN = [
    Case("ring", 3, 2, [RING_2, RING]),
    Case("ring_of_four", 4, 2, [RING]),
    Case("ring_with_slices", 3, 3, [Operation("ring", slices=2), RING]),
    Case("two_shot_then_ring", 3, 2, [TWO_SHOT, RING]),
    Case("one_shot_between", 3, 2, [ONE_SHOT, TWO_SHOT, ONE_SHOT]),
    Case("tree", 4, 1, [TREE]),
    Case("other_tree", 4, 1, [OTHER_TREE]),
    Case("tree_then_ring", 3, 2, [TREE, RING]),
    Case("reduce_then_broadcast", 3, 1, [Operation("tree", "reduce"),
                                         Operation("tree", "broadcast", root=1, rounds=3)]),
    Case("gather_then_scatter", 3, 2, [Operation("ring", "all_gather"),
                                       Operation("direct", "reduce_scatter")]),
    RING_ABORTED,
    aborted("two_shot_aborted", 3, 2, [TWO_SHOT, TWO_SHOT]),
    aborted("tree_aborted", 3, 1, [TREE]),
    RANKS_DISAGREE,
]  # fmt: skip
LARGE = [
    Case("ring_of_four_twice", 4, 2, [RING, RING]),
    Case("ring_of_five", 5, 2, [RING, RING]),
    Case("ring_with_slices_and_rounds", 3, 3, [Operation("ring", rounds=2, slices=2)] * 2),
    Case("ring_four_slots", 4, 4, [RING, RING]),
    Case("two_shot_of_four", 4, 2, [TWO_SHOT]),
    Case("tree_two_slots", 4, 2, [Operation("double_tree", rounds=3, lanes=(0, 1))]),
    Case("tree_of_five", 5, 1, [Operation("double_tree", lanes=(0, 1))]),
    aborted("ring_of_four_aborted", 4, 2, [RING]),
]

LEAVE_A_CREDIT = """  :: OUT(channel, k) - 1 - credit[channel] < SLOTS      \\
  :: ABORTED -> goto leave"""
LOOK_AT_THE_START = """  :: ABORTED -> goto leave               \\
  :: !ABORTED """
GIVE_CREDIT = "credit[channel] = IN(channel, k);"
WRITTEN = "slot[SLOT(channel, OUT(channel, k))] = VALUE(OUT(channel, k), TAG);\n\n"
DEADLOCK, GARBAGE = "invalid end state", "assertion violated (slot["


@dataclass(frozen=True)
class Plant:
    """A fault: one piece of protocol.pml replaced."""

    name: str
    case: Case
    old: str
    new: str
    finding: str


PLANTS = [
    Plant("credit_off_by_one", Case("", 3, 1, [Operation("ring", "broadcast", rounds=3)]),
          "- credit[channel] < SLOTS", "- credit[channel] <= SLOTS", ""),
    Plant("credit_off_by_one_in_a_ring", Case("", 3, 2, [RING, RING]),
          "- credit[channel] < SLOTS", "- credit[channel] <= SLOTS", ""),
    Plant("credit_given_before_the_read", Case("", 3, 2, [RING, RING]),
          "#define BEGIN_READ(channel, k) \\", f"#define BEGIN_READ(channel, k) {GIVE_CREDIT} \\",
          GARBAGE),
    Plant("lost_credit", Case("", 3, 2, [RING, RING]), GIVE_CREDIT,
          "credit[channel] = IN(channel, k) - (IN(channel, k) > 2 -> 1 : 0);", DEADLOCK),
    Plant("lost_credit_in_a_tree", Case("", 4, 1, [TREE]), GIVE_CREDIT,
          f"if :: k == 1 -> skip :: else -> {GIVE_CREDIT} fi;", DEADLOCK),
    Plant("arrival_before_the_data", Case("", 3, 2, [RING]),
          "#define BEGIN_WRITE(channel, k) ",
          "#define BEGIN_WRITE(channel, k) PUBLISH_ARRIVAL(channel, k) ", GARBAGE),
    Plant("arrival_of_another_message_taken", Case("", 3, 2, [RING, RING]),
          "  :: MESSAGE_OF(arrival[SLOT(channel, IN(channel, k))]) == IN(channel, k) ",
          "  :: MESSAGE_OF(arrival[SLOT(channel, IN(channel, k))]) != 0 ", ""),
    Plant("counts_not_kept", Case("", 3, 2, [RING, RING]),
          "#define KEEP_SENT(channel, k) sent[channel] = OUT(channel, k);",
          "#define KEEP_SENT(channel, k) skip;", ""),
    Plant("publishing_after_an_abort", RING_ABORTED, LEAVE_A_CREDIT,
          LEAVE_A_CREDIT.replace("goto leave", "skip      "), GARBAGE),
    Plant("queued_operation_runs_after_an_abort", RING_ABORTED, LOOK_AT_THE_START,
          "  :: true ", GARBAGE),
    Plant("queued_operation_runs_after_ranks_disagree", RANKS_DISAGREE,
          "abort_word[RANK] = true; goto leave", "goto leave", GARBAGE),
    Plant("tag_not_looked_at", RANKS_DISAGREE,
          "  :: arrival[SLOT(channel, IN(channel, k))] == VALUE(IN(channel, k), TAG) ",
          "  :: true ", GARBAGE),
    Plant("one_slot_for_a_ring", Case("", 3, 1, [RING]), "", "", DEADLOCK),
    Plant("one_slot_for_two_shot", Case("", 3, 1, [TWO_SHOT]), "", "", DEADLOCK),
    Plant("as_many_slots_as_slices", Case("", 3, 2, [Operation("ring", slices=2)]), "", "",
          DEADLOCK),
]  # fmt: skip


@dataclass(frozen=True)
class Packets:
    """A model of packets; `shapes` of each operation are chosen from the first so many."""

    ranks: int
    operations: int
    shapes: int = 4
    disagree: bool = False
    aborts: bool = False

    def text(self) -> str:
        defines = {
            "RANKS": self.ranks,
            "OPERATIONS": self.operations,
            "SHAPES": self.shapes,
            "DISAGREE": int(self.disagree),
            "ABORTS": int(self.aborts),
        }
        return "".join(f"#define {name} {n}\n" for name, n in defines.items()) + model.PACKETS


SOUND_PACKETS = Packets(2, 4)
PACKETS_DISAGREE = Packets(2, 2, disagree=True)
PACKETS_ABORTED = Packets(2, 2, shapes=2, aborts=True)
PACKETS = [
    SOUND_PACKETS,
    PACKETS_DISAGREE,
    PACKETS_ABORTED,
    Packets(3, 2, shapes=1),
    Packets(3, 1, shapes=1, disagree=True),
]
LARGE_PACKETS = [
    Packets(2, 5),
    Packets(2, 3, disagree=True),
    Packets(2, 2, aborts=True),
    Packets(3, 1, disagree=True),
    Packets(3, 2, shapes=2),
]
TAGS_DIFFER = "  :: FROM_PEER.tag != TAG -> abort_word[rank] = true; left[rank] = true; goto leave"
WRONG = "!(wrong[rank])"

#: name -> (model, old, new, what is found)
PACKET_PLANTS = {
    "single_buffer": (SOUND_PACKETS, "#define PARITIES 2", "#define PARITIES 1", ""),
    "absent_ctas_not_counted": (SOUND_PACKETS, "EPOCH(1) = EPOCH(1) + 1", "skip", ""),
    "next_kernel_starts_early": (
        SOUND_PACKETS,
        "  (ended[rank] >= operation * CTAS); \\",
        "  true; \\",
        "",
    ),
    "any_new_epoch_taken": (
        SOUND_PACKETS,
        """    :: FROM_PEER.epoch == epoch ->
      if
      :: FROM_PEER.tag == TAG
      :: FROM_PEER.tag != TAG -> assert""",
        """    :: FROM_PEER.epoch != 0 ->
      if
      :: FROM_PEER.tag == TAG
      :: FROM_PEER.tag != TAG -> assert""",
        "assertion violated (odd",
    ),
    "greetings_of_both_parities_in_one_place": (
        SOUND_PACKETS,
        "(epoch) % PARITIES)",
        "((place) == GREETING -> 0 : (epoch) % PARITIES))",
        DEADLOCK,
    ),
    "greeting_not_heard": (PACKETS_DISAGREE, "    hear();\n", "    skip;\n", WRONG),
    "tag_of_the_greeting_not_looked_at": (PACKETS_DISAGREE, TAGS_DIFFER, "  :: else", WRONG),
    "left_without_an_abort": (
        PACKETS_DISAGREE,
        TAGS_DIFFER,
        TAGS_DIFFER.replace("abort_word[rank] = true;", ""),
        "",
    ),
    "queued_operation_runs_after_an_abort": (
        PACKETS_ABORTED,
        "  :: abort_word[rank] -> left[rank] = true; goto leave \\\n  :: !abort_word[rank] \\",
        "  :: true \\",
        "assertion violated (odd",
    ),
}


@pytest.mark.parametrize("case", CLEAN, ids=lambda case: case.name)
def test_slots_and_credits_hold(case: Case, tmp_path: Path) -> None:
    verdict = model.search(case.text(), tmp_path)
    assert verdict.error == ""
    assert verdict.states > 100


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_fault_in_slots_and_credits_is_found(plant: Plant, tmp_path: Path) -> None:
    text = plant.case.text()
    if plant.old:
        text = model.planted(text, plant.old, plant.new)
    verdict = model.search(text, tmp_path)
    assert verdict.error != ""
    assert plant.finding in verdict.error


@pytest.mark.parametrize("case", PACKETS, ids=str)
def test_packets_hold(case: Packets, tmp_path: Path) -> None:
    assert model.search(case.text(), tmp_path).error == ""


@pytest.mark.parametrize("name", PACKET_PLANTS)
def test_a_fault_in_packets_is_found(name: str, tmp_path: Path) -> None:
    case, old, new, finding = PACKET_PLANTS[name]
    verdict = model.search(model.planted(case.text(), old, new), tmp_path)
    assert verdict.error != ""
    assert finding in verdict.error


@pytest.mark.campaign
@pytest.mark.timeout(2 * CAMPAIGN_LIMIT_S)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_larger_models_hold(case: Case, tmp_path: Path) -> None:
    assert model.search(case.text(), tmp_path, CAMPAIGN_LIMIT_S).error == ""


@pytest.mark.campaign
@pytest.mark.timeout(2 * CAMPAIGN_LIMIT_S)
@pytest.mark.parametrize("case", LARGE_PACKETS, ids=str)
def test_larger_packet_models_hold(case: Packets, tmp_path: Path) -> None:
    assert model.search(case.text(), tmp_path, CAMPAIGN_LIMIT_S).error == ""
