"""An imprint changes no bit of training, follows what decides its bits, and tells when other code went on."""
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from thesis_ltc.core.provenance import (
    IMAGES,
    STEP_TOLERANCE,
    STEPS,
    Imprint,
    capability,
    digest,
    imprint_difference,
    imprint_digest,
)
from thesis_ltc.data import load
from thesis_ltc.data.augment import Augmentation
from thesis_ltc.heads import classifier
from thesis_ltc.study.record import parse_record
from thesis_ltc.training import (
    Images,
    Interrupted,
    Learner,
    Recipe,
    StackedLearner,
    Training,
    fit_all,
    imprint,
    inputs,
    replay,
    reproducible,
    resume,
)
from thesis_ltc.training.checkpoint import load_tensors, save_tensors
from thesis_ltc.training.resume import checkpoint_path

SENTENCE = "pool:1 mix:4 | z | linear:6 | batch | ncp:6/4/2:3/2/2/2 | fc:12/7"   # with dropout
RECIPE = Recipe("bce-dice", 12, 3e-3, 2, 50, 48, 0, "cpu", "float32", 1)
both_learners = pytest.mark.parametrize("learner", [Learner, StackedLearner])


class Maps(Images):
    "Images as a random backbone sees them."
    backbone = classifier(SENTENCE, 10, 48, width=0.125, seed=9).backbone.eval().requires_grad_(False)

    def training(self, rows: np.ndarray, seeds: Sequence[int], epoch: int, number: int) -> list[torch.Tensor]:
        return [self.backbone(images) for images in super().training(rows, seeds, epoch, number)]

    def evaluation(self, rows: np.ndarray) -> torch.Tensor:
        return self.backbone(super().evaluation(rows))


@pytest.fixture(scope="module")
def digits():
    return load("digits").limited(50)


def fresh(folder: Path, seeds: Sequence[int] = (4, 5), **changes) -> list[Training]:
    "Trainings that have not begun; `changes` are fields of the recipe."
    found = []
    for seed in seeds:
        head = classifier(SENTENCE, 10, 48, width=0.125, seed=seed).head
        found.append(Training(head, replace(RECIPE, seed=seed, **changes), folder / f"seed{seed}"))
    return found


def train(trainings: list[Training], data, learner: type[Learner]) -> list[Training]:
    for training in trainings:
        training.folder.mkdir(parents=True, exist_ok=True)
    with reproducible(1):
        fit_all(trainings, data, inputs=Maps(data, RECIPE), learner=learner)
    assert not any(training.failure for training in trainings)
    return trainings


def replayed(trainings: list[Training], data, learner: type[Learner]) -> list[Imprint]:
    with reproducible(1):
        return replay(trainings, data, Maps(data, RECIPE), learner)


def outcome(training: Training) -> dict:
    "Weights, moments and losses, without times."
    moments = [training.optimiser.state[parameter] for parameter in training.model.parameters()]
    timeless = [name for name in training.history[0] if "seconds" not in name]
    history = [[row[name] for name in timeless] for row in training.history]
    return {"weights": digest(training.model.state_dict()), "moments": digest(*moments), "history": history}


@both_learners
def test_no_bit_changes(learner, digits, tmp_path, monkeypatch):
    taken = train(fresh(tmp_path / "with"), digits, learner)
    monkeypatch.setattr(imprint.FirstSteps, "complete", lambda self: None)
    without = train(fresh(tmp_path / "without"), digits, learner)
    assert [training.imprint for training in without] == [None, None]
    assert [outcome(training) for training in taken] == [outcome(training) for training in without]


@both_learners
def test_a_replay_finds_what_training_records(learner, digits, tmp_path):
    waiting = fresh(tmp_path)
    before = [digest(training.model.state_dict()) for training in waiting]
    found = replayed(waiting, digits, learner)
    assert [digest(training.model.state_dict()) for training in waiting] == before
    assert not list(tmp_path.iterdir())
    first, second = trained = [training.imprint for training in train(waiting, digits, learner)]
    assert found == trained
    assert len(first.losses) == len(first.gradients) == STEPS and np.shape(first.logits) == (IMAGES, 10)
    assert all(getattr(first, name) != getattr(second, name) for name in asdict(first))
    assert replayed(fresh(tmp_path, [5]), digits, learner) == [second]   # alone as beside another


@both_learners
def test_its_parts_are_what_they_are_called(learner, digits, tmp_path, monkeypatch):
    "The batch as the network sees it; the weights after the third step, and their logits."
    batches, models = [], []
    step = learner.step

    def watched(self: Learner, given: Sequence[torch.Tensor], *others) -> torch.Tensor:
        batches.append(digest(given[0]))
        result = step(self, given, *others)
        models.append(copy.deepcopy(self.trainings[0].model))
        return result

    monkeypatch.setattr(learner, "step", watched)
    training, = train(fresh(tmp_path, [4]), digits, learner)
    model = models[STEPS - 1].eval()
    with torch.no_grad():
        logits = model(Maps(digits, RECIPE).evaluation(digits.rows("val")[:IMAGES]))
    numbers = {name: value for name, value in model.state_dict().items() if not name.endswith(".wiring")}
    assert training.imprint.batch == batches[0] and training.imprint.weights == digest(numbers)
    assert training.imprint.logits == logits.tolist()


def test_an_epoch_of_two_steps_has_an_imprint_of_two(digits, tmp_path):
    data = digits.limited(20)
    training, = train(fresh(tmp_path, [4]), data, Learner)
    assert len(training.imprint.losses) == 2
    assert replayed(fresh(tmp_path / "again", [4]), data, Learner) == [training.imprint]


class Brighter(Augmentation):
    "Augmentation with one constant changed in the last digits."

    def __init__(self, image_size: int) -> None:
        super().__init__(image_size, contrast=0.2 + 1e-7)


def nudged_adam(parameters, **options) -> torch.optim.Optimizer:
    return ADAM(parameters, **options, eps=1.1e-8)


ADAM = torch.optim.Adam
CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "augmentation": lambda patch: patch.setattr(inputs, "Augmentation", Brighter),
    "loss": lambda patch: patch.setattr("thesis_ltc.training.objective.DICE_WEIGHT", 1 + 1e-6),
    "optimiser": lambda patch: patch.setattr(torch.optim, "Adam", nudged_adam),
}


@both_learners
@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_what_computes(change, learner, digits, tmp_path, monkeypatch):
    before, = replayed(fresh(tmp_path, [4]), digits, learner)
    CHANGES[change](monkeypatch)
    after, = replayed(fresh(tmp_path, [4]), digits, learner)
    assert before.weights != after.weights and (before.batch != after.batch) == (change == "augmentation")


@both_learners
def test_it_follows_the_start(learner, digits, tmp_path):
    before, = replayed(fresh(tmp_path, [4]), digits, learner)
    training, = fresh(tmp_path, [4])
    with torch.no_grad():
        training.model.readout.layers[-1].bias[3] += 1e-6
    after, = replayed([training], digits, learner)
    assert before.weights != after.weights and before.batch == after.batch


@both_learners
def test_where_numbers_are_not_finite_there_is_no_imprint(learner, digits, tmp_path):
    ill, well = fresh(tmp_path)
    with torch.no_grad():
        ill.model.readout.layers[-1].bias[2] = float("nan")
    missing, found = replayed([ill, well], digits, learner)
    assert missing is None and found.losses[0] > 0


# Going on

def stopped(folder: Path, data, learner: type[Learner], seeds: Sequence[int] = (4, 5)) -> None:
    "Train one epoch of two."
    trainings = fresh(folder, seeds)

    def stop(history: list) -> None:
        if trainings[-1].history:
            raise Interrupted("enough")

    for training in trainings:
        training.on_epoch = stop
    with pytest.raises(Interrupted):
        train(trainings, data, learner)


@both_learners
def test_a_run_that_goes_on_as_it_began_says_nothing(learner, digits, tmp_path):
    straight = train(fresh(tmp_path / "straight"), digits, learner)
    stopped(tmp_path / "stopped", digits, learner)
    resumed = train(fresh(tmp_path / "stopped"), digits, learner)
    assert [outcome(training) for training in resumed] == [outcome(training) for training in straight]
    assert [training.imprint for training in resumed] == [training.imprint for training in straight]
    assert [training.resumed for training in resumed] == [[], []]
    state = load_tensors(checkpoint_path(resumed[0].folder))[1]
    assert Imprint.of(state["imprint"]) == resumed[0].imprint and state["resumed"] == []
    assert state["environment"].keys() == {"torch", "device_name", "capability", "imprint"}


@both_learners
def test_another_machine_is_told_once(learner, digits, tmp_path, monkeypatch):
    stopped(tmp_path, digits, learner)
    monkeypatch.setattr(resume, "capability", lambda device: "AVX9")
    first, other = train(fresh(tmp_path, epochs=3), digits, learner)
    (told,) = first.resumed
    before = load_tensors(checkpoint_path(first.folder))[1]
    assert told["epoch"] == 1 and list(told["changed"]) == ["capability"]
    assert told["changed"]["capability"][1] == "AVX9" != told["changed"]["capability"][0]
    assert before["resumed"] == first.resumed and before["environment"]["capability"] == "AVX9"
    again, _ = train(fresh(tmp_path, epochs=4), digits, learner)
    assert again.resumed == first.resumed and len(again.history) == 4
    for training in (first, other):
        tensors, state = load_tensors(checkpoint_path(training.folder))
        environment = state["environment"] | {"torch": "1.0", "device_name": "another"}
        save_tensors(checkpoint_path(training.folder), tensors, state | {"environment": environment})
    third, _ = train(fresh(tmp_path, epochs=5), digits, learner)
    assert [list(entry["changed"]) for entry in third.resumed] == [["capability"], ["torch", "device_name"]]
    assert [entry["epoch"] for entry in third.resumed] == [1, 4]
    assert third.resumed[1]["changed"]["torch"] == ["1.0", str(torch.__version__)]


@both_learners
def test_other_numbers_are_told(learner, digits, tmp_path, monkeypatch):
    stopped(tmp_path, digits, learner)
    stored = Imprint.of(load_tensors(checkpoint_path(tmp_path / "seed4"))[1]["imprint"])
    monkeypatch.setattr(inputs, "Augmentation", Brighter)
    computed, = replayed(fresh(tmp_path, [4]), digits, learner)
    first, _ = train(fresh(tmp_path), digits, learner)
    change = [imprint_digest(stored), imprint_digest(computed)]
    assert first.resumed == [{"epoch": 1, "changed": {"imprint": change}}]
    assert first.imprint == stored != computed   # a run keeps the imprint of its own first steps


def test_a_checkpoint_from_before_there_were_imprints_goes_on(digits, tmp_path):
    stopped(tmp_path, digits, Learner, [4])
    path = checkpoint_path(tmp_path / "seed4")
    tensors, state = load_tensors(path)
    identity = state["identity"] | {"epochs": None, "patience": None, "torch": "1", "device name": "old"}
    save_tensors(path, tensors, {"identity": identity, "history": state["history"]})
    training, = train(fresh(tmp_path, [4]), digits, Learner)
    computed, = replayed(fresh(tmp_path, [4]), digits, Learner)
    assert training.resumed == [{"epoch": 1, "changed": {"imprint": [None, imprint_digest(computed)]}}]
    assert training.imprint is None and len(training.history) == 2


def test_another_recipe_is_still_refused(digits, tmp_path):
    stopped(tmp_path, digits, Learner, [4])
    training, = fresh(tmp_path, [4], learning_rate=1e-3)
    fit_all([training], digits, inputs=Maps(digits, RECIPE))
    assert "begun otherwise (learning_rate 0.003 -> 0.001)" in str(training.failure) and not training.history


RECORDS = """
import sys
from pathlib import Path
from thesis_ltc.study import Experiment, run

for head, rate in (("fc", 1e-2), ("ncp-z", 1e-2)):
    experiment = Experiment(
        data="digits", head=head, image_size=136, width=0.125, limit=60, epochs=1, batch_size=20,
        learning_rate=rate, precision="float32", threads=1, device="cpu",
        normaliser="none" if head == "fc" else "batch")
    run(experiment, 0, sys.argv[1], echo=lambda history: None)
"""


@pytest.mark.skipif(not capability("cpu").startswith("AVX512"), reason="needs AVX-512, to compare with AVX2")
def test_another_instruction_set_is_no_other_code(tmp_path):
    "CRNet's convolutions differ in bits between AVX2 and AVX-512; their first step differs by rounding only."
    narrow = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    imprints = {}
    for name, limits in {"wide": {}, "narrow": narrow}.items():
        folder = tmp_path / name
        command = [sys.executable, "-c", RECORDS, str(folder)]
        subprocess.run(command, env=os.environ | limits, check=True, capture_output=True)
        paths = sorted(folder.glob("*/seed0/record.json"))
        imprints[name] = [parse_record(path.read_bytes()).imprint for path in paths]
    pairs = list(zip(*imprints.values(), strict=True))
    assert len(pairs) == 2 and all(first != second for first, second in pairs)
    assert all(0 < imprint_difference(first, second) <= STEP_TOLERANCE for first, second in pairs)
    changed = replace(pairs[0][0], losses=[1.0001 * loss for loss in pairs[0][0].losses])
    assert imprint_difference(changed, pairs[0][1]) > STEP_TOLERANCE
