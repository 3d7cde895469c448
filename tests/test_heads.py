"""Every named head as a whole: size, gradients, precision, determinism, and whether its circuit can learn."""
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.nn import functional as F

from thesis_ltc.core.streams import seeded
from thesis_ltc.heads.circuit import Circuit, Factors, count_trained
from thesis_ltc.heads.head import build_module
from thesis_ltc.heads.models import HEADS, circuits, classifier, macs, parameter_counts, stage_shapes
from thesis_ltc.heads.scan import image_regions
from thesis_ltc.heads.sentence import CIRCUITS, parse, parse_word
from thesis_ltc.heads.shrink import UpsamplingError

REPORT = {  # at 224 px: last tensor; live parameters of the whole model; of its circuit dense, live
    "fc": ((128, 13, 13), 546_882, 0, 0),
    "fc3": ((128, 13, 13), 22_236_918, 0, 0),
    "ncp-y": ((4, 8, 8), 505_273, 3_999, 1_123),
    "ncp-z": ((16, 13, 13), 512_277, 3_999, 1_123),
    "ncp-patch": ((16, 16, 16), 515_061, 3_999, 1_123),
    "ncp-y-double": ((8, 16, 16), 512_136, 25_606, 7_422),
    "ncp-y-half": ((32, 16, 16), 561_830, 180_012, 53_956),
}
SAVED = ["fc3", "ncp-z", "ncp-y-double", "ncp-z-bi-shared", "ncp-all"]
SAVED += ["z-cfc", "z-lstm", "z-frozen", "z-random", "z-state", "z-attention"]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]


def thin(head: str, **options) -> torch.nn.Module:
    "A small classifier: 136 px, an eighth of the channels, weights of seed 0."
    return classifier(head, **{"image_size": 136, "width": 0.125, "seed": 0} | options)


def follows_numbers(head: str) -> bool:
    "Whether the numbers of a sample choose its order or damage, so that rounding may change them."
    return "shuffled-each" in HEADS[head] or "damage" in HEADS[head]


@pytest.fixture
def deterministic(monkeypatch):
    "Deterministic algorithms on, and off again."
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("head", REPORT)
def test_the_reports_tensors_and_totals(head: str) -> None:
    tensor, live, circuit_dense, circuit_live = REPORT[head]
    model = classifier(head)
    counts, shapes = parameter_counts(model), stage_shapes(model)
    assert (shapes["backbone"], shapes["shrink"]) == ([(128, 27, 27)], [tensor])
    assert counts["live"] == live == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (counts["circuit_dense"], counts["circuit_live"]) == (circuit_dense, circuit_live)
    assert counts["dense"] == live - circuit_live + circuit_dense
    assert counts["backbone"] == 503_616
    assert 2.52e9 < macs(model) < 2.56e9


@pytest.mark.parametrize("head", HEADS)
def test_counts_agree_with_each_other(head: str) -> None:
    model = thin(head)
    counts = parameter_counts(model)
    assert counts["dense"] - counts["live"] == counts["circuit_dense"] - counts["circuit_live"] >= 0
    assert counts["live"] == counts["backbone"] + counts["head"] >= counts["head"] > counts["circuit_live"]
    wirings = [circuit.wiring for circuit in circuits(model)]
    assert counts["synapses"] == sum(len(w.source) + len(w.sensory_source) for w in wirings)
    assert macs(model) > macs(thin("fc")) - 2 * 16 * 8**2


@pytest.mark.parametrize("head", HEADS)
def test_the_dense_count_is_what_ncps_trains(head: str) -> None:
    "The formula against ncps's own parameters, its masks left out."
    model = thin(head)
    trained = [circuit for circuit in circuits(model) if count_trained(circuit)]
    counts = parameter_counts(model)
    if trained:
        theirs = [p for circuit in trained for p in circuit.to_ncps().parameters() if p.requires_grad]
        assert counts["circuit_dense"] == sum(p.numel() for p in theirs)
    elif not parse(HEADS[head]).circuit or "frozen" in HEADS[head]:
        assert counts["circuit_dense"] == counts["circuit_live"] == 0


@pytest.mark.parametrize("head", HEADS)
def test_upsampling_is_refused_unless_asked_for(head: str) -> None:
    "16 rows can't come from the 13 of 112 px; the message says what was got, expected, and what to do."
    if "grid:16" not in HEADS[head]:
        assert stage_shapes(thin(head, image_size=112))["readout"] == [(2,)]
        return
    with pytest.raises(UpsamplingError) as caught:
        thin(head, image_size=112)
    assert isinstance(caught.value, ValueError) and str(caught.value) == (
        "grid:16 needs at least 16 rows and columns, but the map has 13; "
        "give a larger map or allow_upsampling; the map at 112 px has 13 rows: use image_size >= 136")
    stretched = thin(head, image_size=112, allow_upsampling=True)
    assert stage_shapes(stretched)["shrink"][0][1:] == (16, 16) == stage_shapes(thin(head))["shrink"][0][1:]


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_gets_a_gradient_and_samples_stay_apart(head: str) -> None:
    "Logits have their shape, no image sees its neighbours, and channels-last storage changes nothing."
    model = thin(head, classes=5)
    images = torch.rand(3, 1, 136, 136, generator=torch.Generator().manual_seed(0))
    model(images).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and (p.grad != 0).any(), name
    logits = model.eval()(images)
    assert logits.shape == (3, 5) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[2], model(images[2:])[0])
    last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    if not follows_numbers(head):
        torch.testing.assert_close(last, logits, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def digits():
    "64 digits of 136 px, and whether each is odd."
    found = load_digits()
    images = torch.tensor(found.images[:64] / 16, dtype=torch.float32)[:, None]
    return images.repeat_interleave(17, 2).repeat_interleave(17, 3), torch.tensor(found.target[:64] % 2)


@pytest.mark.parametrize("head", [head for head in HEADS if parse(HEADS[head]).circuit])
def test_the_circuit_alone_halves_the_loss(head: str, digits) -> None:
    "All other weights keep their start; a circuit that passes no gradient, or that nobody reads, fails."
    images, labels = digits
    model = thin(head).eval()
    trained = [p for p in model.head.circuit.parameters() if p.requires_grad]
    if "frozen" in HEADS[head]:
        assert not trained
        return
    with torch.no_grad():
        maps = model.head.shrink.pool(model.backbone(images))
    pooled, optimiser, losses = model.head.without_pooling(), torch.optim.Adam(trained, 0.02), []
    while not losses or losses[-1] >= losses[0] / 2:
        assert len(losses) < 500, f"the loss went from {losses[0]} to {losses[-1]}"
        loss = F.cross_entropy(pooled(maps), labels)
        losses.append(loss.item())
        for p, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            p.grad = gradient
        optimiser.step()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", HEADS)
def test_training_twice_gives_the_same_bits(head: str, device: str, deterministic) -> None:
    "Two steps of Adam, twice, with dropout, batch normalisation and every pooling in between."
    images, labels = torch.rand(4, 1, 136, 136).to(device), torch.tensor([0, 1, 1, 0], device=device)

    def train() -> dict:
        model = thin(head, normaliser="batch").to(device)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        torch.manual_seed(0)
        for _ in range(2):
            optimiser.zero_grad()
            F.mse_loss(model(images), F.one_hot(labels, 2).float()).backward()
            optimiser.step()
        return model.state_dict()

    first, second = train(), train()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_backbone_with_channels_last(head: str, device: str) -> None:
    "Under autocast logits stay float32 and agree loosely with single precision; gradients are finite."
    model, images = thin(head).eval().to(device), torch.rand(4, 1, 136, 136, device=device)
    expected = model(images)
    model, images = (thing.to(memory_format=torch.channels_last) for thing in (model, images))
    with torch.autocast(device, torch.bfloat16):
        maps = model.backbone(images)
        logits = model(images)
    assert maps.dtype == torch.bfloat16 and logits.dtype == torch.float32
    if not follows_numbers(head):
        torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    logits.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.isfinite(gradient).all() and gradient.dtype == torch.float32 for gradient in gradients)


def test_the_circuit_does_not_see_bfloat16() -> None:
    "From the map on, autocast changes no bit."
    head, maps = thin("ncp-patch").head, torch.rand(2, 16, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head.trace(maps)
    for stage, tensors in head.trace(maps).items():
        assert all(torch.equal(one, other) for one, other in zip(inside[stage], tensors, strict=True)), stage


@pytest.mark.parametrize("head", REPORT)
def test_every_head_learns(head: str) -> None:
    "Bright tops against bright bottoms, told apart within 40 steps."
    torch.manual_seed(0)
    labels = torch.arange(8) % 2
    images = 0.1 * torch.rand(8, 1, 136, 136)
    images[labels == 0, :, :68] += 0.8
    images[labels == 1, :, 68:] += 0.8
    model = thin(head)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    assert (model.eval()(images).argmax(1) == labels).all()


@pytest.mark.parametrize("head", SAVED)
def test_weights_survive_a_file(head: str, tmp_path) -> None:
    "A model of another seed that loads the weights is the same model; the wiring is made again, not saved."
    model, other, images = thin(head).eval(), thin(head, seed=1).eval(), torch.rand(2, 1, 136, 136)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(images), model(images))
    assert not any(name.endswith(("source", "target", "matrix")) for name in model.state_dict())


@pytest.mark.parametrize("head", HEADS)
def test_other_images_classes_and_precision(head: str) -> None:
    "Three channels, ten classes, double precision, and a batch of one."
    model = thin(head, classes=10, channels=3).double().eval()
    logits = model(torch.rand(1, 3, 136, 136, dtype=torch.float64))
    assert logits.shape == (1, 10) and logits.dtype == torch.float64


def test_settings_reach_the_circuit() -> None:
    "Elapsed, unfolds, normaliser and wiring seed each change the logits, and nothing of the backbone."
    images, base = 5 * torch.rand(2, 1, 136, 136), thin("ncp-z").eval()
    for change in ({"elapsed": 0.1}, {"unfolds": 2}, {"normaliser": "layer"}, {"wiring_seed": 1}):
        model = thin("ncp-z", **change).eval()
        assert torch.equal(model.backbone(images), base.backbone(images)), change
        assert not torch.equal(model(images), base(images)), change


def circuit_of(word: str, features: int = 32, **factors) -> Circuit:
    "The circuit of a word, its weights of seed 0."
    with seeded(0, "circuit"):
        return build_module(CIRCUITS, parse_word(word, "circuit"), features, Factors(**factors))


@pytest.mark.parametrize("sizes", ["12/6/1", "24/12/2:12/8/12/12", "4/3/2:1/1/0/1", "12/6/1:12/6/36/6"])
@pytest.mark.parametrize("wiring_seed", [0, 1, 7, 22222, 2**32 - 1])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_a_random_wiring_has_the_policys_counts(sizes: str, wiring_seed: int, density: float) -> None:
    "As many neurons, synapses and parameters; other ends; a function of the wiring seed alone."
    factors = {"wiring_seed": wiring_seed, "density": density}
    drawn, policy = (circuit_of(f"{name}:{sizes}", **factors).ltc for name in ("random", "ncp"))
    one, other = drawn.wiring, policy.wiring
    assert (one.sensory, one.inter, one.command, one.motor) == (
        other.sensory, other.inter, other.command, other.motor)
    assert len(one.sensory_source) == len(other.sensory_source) and len(one.source) == len(other.source)
    assert count_trained(drawn) == count_trained(policy) and one != other
    assert circuit_of(f"random:{sizes}:frozen", **factors).ltc.wiring == one
    assert circuit_of(f"random:{sizes}", **factors | {"wiring_seed": wiring_seed ^ 1}).ltc.wiring != one


@pytest.mark.parametrize("name", ["ncp", "random"])
def test_the_whole_state_is_the_same_circuit_read_elsewhere(name: str) -> None:
    "The same start; its first column is the motor neuron; the others are the state of the other neurons."
    motor, whole = circuit_of(f"{name}:12/6/1"), circuit_of(f"{name}:12/6/1:state")
    sequence = torch.rand(3, 7, 32)
    outputs, state = whole.ltc(sequence)
    assert outputs.shape == (3, 7, 19)
    torch.testing.assert_close(outputs[..., :1], motor(sequence))
    torch.testing.assert_close(outputs[:, -1], motor.ltc(sequence)[1])
    torch.testing.assert_close(outputs[:, -1], state)
    torch.testing.assert_close(whole(sequence[2:]), outputs[2:])
    assert count_trained(whole) == count_trained(motor) + 2 * 18
    assert thin("z-state").head.readout.gather.features == 16 * 19


@pytest.mark.parametrize("word", ["random:12/6/1", "random:12/6/1:state", "ncp:12/6/1:state"])
def test_the_controls_kernels_agree_with_the_readable_cell(word: str) -> None:
    "Outputs and gradients of the compiled loops and of the readable cell."
    sequence, results = torch.rand(3, 7, 32), []
    for backend in ("auto", "reference"):
        circuit, leaf = circuit_of(word), sequence.clone().requires_grad_()
        circuit.ltc.backend = backend
        outputs = circuit(leaf)
        outputs.sin().sum().backward()
        results.append((outputs, leaf.grad, *(p.grad for p in circuit.parameters())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ncp", "random"])
def test_a_frozen_control_keeps_its_start(name: str) -> None:
    frozen, free = (circuit_of(f"{name}:12/6/1:state{mark}") for mark in (":frozen", ""))
    assert count_trained(frozen) == 0 < count_trained(free)
    sequence = torch.rand(2, 5, 32)
    assert torch.equal(frozen(sequence), free(sequence))


def test_steps_are_found_on_the_image() -> None:
    "A change outside a step's region doesn't change that step."
    model, images = thin("ncp-patch").eval(), torch.rand(1, 1, 136, 136)
    regions = image_regions(model.head.scan[0], model.head.shrink.bounds, 136)
    before, = model.head.trace(model.backbone(images))["scan"]
    top, left, bottom, right = regions[5].tolist()
    outside = torch.zeros(1, 1, 136, 136)
    outside[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right]
    after, = model.head.trace(model.backbone(outside))["scan"]
    torch.testing.assert_close(after[0, 5], before[0, 5])
    assert not torch.allclose(after[0, 0], before[0, 0])


def test_heads_need_no_heavy_library() -> None:
    "Neither pictures nor tables nor nbdev are imported by building a head."
    heavy = "matplotlib torchvision pandas sklearn nbdev numba scipy".split()
    code = f"import sys, thesis_ltc.heads; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
