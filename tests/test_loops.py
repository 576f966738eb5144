"""The gradient generators in other people's training loops: skipped steps, frozen layers, copies, schedulers."""

import copy
import io
import math
import pickle
import textwrap
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_distributed import launch
from test_hypernet import MAKERS, RELEASED, UNLEARNED, backward, formula, network, relative, small_fsg
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gate
import hypernet
import models
import quantizers
from fsg_released import FastUpdate
from gate import GatedHistory
from hypernet import FSG, STE
from metaquant import LSTMFC, FCGrad, MultiFC

# ---------------------------------------------------------------------------------------------------------------------
# Random loops. `Plain` says what a generator should do, in plain control flow and layer by layer.


class Plain:
    """A generator's state as lists, one entry per layer, each of which is written only in a step that counts for it."""

    def __init__(self, name, gen, layers):
        self.name, self.layers = name, layers
        self.nets = copy.deepcopy(gen)  # for its nets alone
        self.grads = [[] for _ in layers]  # all that were stored
        self.latents = [layer.weight.detach().clone() for layer in layers]  # at the last of these
        self.state = [None] * len(layers)  # lstmfc: the LSTM's state before the last step
        self.next_state = [None] * len(layers)  # and after it
        self.past = [torch.zeros_like(w) for w in self.latents]  # gate
        if name not in UNLEARNED:
            self.optimizer = torch.optim.Adam(self.nets.parameter_groups())

    def formula(self):
        """G of the last step that counted, for every layer."""
        zeros = [torch.zeros_like(w) for w in self.latents]
        steps = range(1, getattr(self.nets, "length", 1) + 1)
        grads = [[g[-k] if k <= len(g) else z for g, z in zip(self.grads, zeros, strict=True)] for k in steps]
        return formula(self.name, self.nets, self.layers, [self.latents], grads[::-1], self.state)

    def through_float32(self):
        """What is kept, rounded to float32."""
        near = lambda kept: (
            kept.float().double() if isinstance(kept, torch.Tensor) else kept and [near(x) for x in kept]
        )
        for name in ("grads", "latents", "state", "next_state", "past"):
            setattr(self, name, near(getattr(self, name)))
        if self.name not in UNLEARNED:
            moments = [m for state in self.optimizer.state.values() for m in (state["exp_avg"], state["exp_avg_sq"])]
            for x in [*(p.data for p in self.nets.parameters()), *moments]:
                x.copy_(near(x))
        if self.name == "lstmfc":
            self.remember()

    def remember(self):
        """lstmfc: the LSTM's state after the last step."""
        for i, W in enumerate(self.latents):
            self.state[i] = self.state[i] or (W.new_zeros(W.numel(), 6),) * 2
            pre = quantizers.pre_quantize(W, self.layers[i].quantizer).reshape(-1, 1)
            self.next_state[i] = [x.detach() for x in self.nets.cell(pre, self.state[i])]

    def generate(self, ghats):
        """ghats: of each layer, None where there is none. Returns G of each layer."""
        there = [i for i, g in enumerate(ghats) if g is not None]
        if not all(torch.isfinite(ghats[i].square().sum()) for i in there):
            return ghats
        weights = [layer.weight.detach().clone() for layer in self.layers]
        D = [quantizers.calibration(w, layer.quantizer) for w, layer in zip(weights, self.layers, strict=True)]
        if self.name not in UNLEARNED:
            learned = [i for i in there if len(self.grads[i]) > 1]
            if learned:
                G, v = self.formula(), {i: -D[i] * ghats[i] for i in learned}
                norm = sum(x.square().sum() for x in v.values()).sqrt().clamp_min(1e-300)
                self.optimizer.zero_grad()
                sum((x / norm * G[i]).sum() for i, x in v.items()).backward()
                self.optimizer.step()
            for i in learned:
                self.state[i] = self.next_state[i]
        for i in there:
            same = (self.latents[i] >= 0) == (weights[i] >= 0)
            self.past[i] = ghats[i] + torch.where(same, 0.8 * self.past[i], 0)
            self.grads[i].append(ghats[i])
            self.latents[i] = weights[i]
        if self.name == "lstmfc":
            self.remember()
        if self.name in MAKERS:
            made = [G.detach() for G in self.formula()]
        out = [None] * len(ghats)
        for i in there:
            r = weights[i].abs() / weights[i].square().mean().sqrt().clamp_min(1e-300)
            out[i] = D[i] * self.past[i] / (0.35 + r) if self.name == "gate" else D[i] * ghats[i]
            if self.name in MAKERS and len(self.grads[i]) > 1:
                out[i] = made[i]
        return out


def make_layers(quantizer):
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Conv2d(2, 2, 3), nn.Linear(4, 3), nn.Linear(1, 2)]).double()
    for layer in layers:
        layer.quantizer = quantizer
    return layers


kinds = st.sampled_from(["one", "two", "none", "none", "zero", "nan", "inf", "huge"])
step = st.tuples(st.just("step"), st.lists(kinds, min_size=3, max_size=3), st.booleans(), st.sampled_from([0, 1, 1, 1]))
good = st.tuples(
    st.just("step"), st.lists(st.sampled_from(["one", "two"]), min_size=3, max_size=3), st.booleans(), st.just(1)
)
change = st.sampled_from(["again", "deepcopy", "pickle", "load", "assign", "channels_last", "contiguous", "float32"])
freeze = st.tuples(st.sampled_from(["freeze", "thaw"]), st.integers(0, 2))
loops = st.lists(st.one_of(step, step, good, good, st.tuples(change), freeze), min_size=3, max_size=14)
WAYS = {
    "ste": STE,
    "gate": GatedHistory,
    "fsg-mamba": lambda layers: small_fsg(layers, expand=2, d_state=2, fast_act="tanh"),
    "fsg-flat": lambda layers: small_fsg(layers, history="flat", expand=2, d_state=2, fast_act="tanh"),
    "fsg-as-written": lambda layers: small_fsg(layers, expand=2, d_state=2, balance="none"),
    "fsg-lstm": lambda layers: small_fsg(layers, hgs="lstm", fast_act="tanh"),
    "multifc": lambda layers: MultiFC(layers, 6, "tanh"),
    "fcgrad": lambda layers: FCGrad(layers, 6, "tanh"),
    "lstmfc": lambda layers: LSTMFC(layers, 6),
}


def check_loop(name, quantizer, loop, seed):
    make = WAYS[name]
    net = make_layers(quantizer)
    gen = make(list(net))
    plain = Plain(name, gen, net)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    random, near = torch.Generator().manual_seed(seed), 1e-8
    for what, *how in loop:
        if what == "step":
            which, to_none, update = how
            optimizer.zero_grad(set_to_none=to_none)
            for layer, kind in zip(net, which, strict=True):
                for _ in range({"none": 0, "two": 2}.get(kind, 1)):
                    c = torch.randn(layer.weight.shape, generator=random, dtype=torch.float64)
                    c = c * 0 if kind == "zero" else c
                    if kind in ("nan", "inf", "huge"):
                        c.view(-1)[-1] = {"nan": float("nan"), "inf": -float("inf"), "huge": 1e200}[kind]
                    if layer.weight.requires_grad:
                        (layer.weight * c).sum().backward()
            ghats = [w.grad.clone() if w.requires_grad and w.grad is not None else None for w in gen.weights]
            bad = any(g is not None and not g.square().sum().isfinite() for g in ghats)
            if all(g is None for g in ghats) and any(w.requires_grad for w in gen.weights):
                with pytest.raises(RuntimeError, match="no binary layer has a gradient"):
                    gen.generate()
                continue
            before = copy.deepcopy(gen.state_dict())
            gen.generate()
            for w, G in zip(gen.weights, plain.generate(ghats), strict=True):
                if G is None:
                    assert w.grad is None or not w.requires_grad
                else:
                    assert (
                        torch.allclose(w.grad, G, 0, 0, equal_nan=True)
                        if bad
                        else relative(w.grad, G) < near or G.abs().max() < 1e-100  # of a gradient of zeros
                    )
            if bad:
                assert_same_state(before, gen.state_dict())
            if update and not bad:
                optimizer.step()
        elif what == "again" and any(w.requires_grad for w in gen.weights):
            with pytest.raises(RuntimeError, match="no binary layer has a gradient"):
                gen.generate()
        elif what in ("freeze", "thaw"):
            net[how[0]].weight.requires_grad_(what == "thaw")
        elif what in ("deepcopy", "pickle"):
            both = net, gen, optimizer
            net, gen, optimizer = copy.deepcopy(both) if what == "deepcopy" else pickle.loads(pickle.dumps(both))
            plain.layers = net
            assert all(a is b.weight for a, b in zip(gen.weights, net, strict=True))
        elif what == "load":
            state, gen = copy.deepcopy(gen.state_dict()), make(list(net))
            gen.load_state_dict(state)
        elif what == "assign":
            net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
            optimizer = torch.optim.SGD(net.parameters(), 0.05)
        elif what == "float32":
            net.float(), gen.follow(), net.double(), gen.follow(), plain.through_float32()
            near = 1e-4
        elif what in ("channels_last", "contiguous"):
            net.to(memory_format=torch.channels_last if what == "channels_last" else torch.contiguous_format)
    if name not in UNLEARNED:
        for a, b in zip(gen.parameters(), plain.nets.parameters(), strict=True):
            assert relative(a, b) < 10 * near
        history = [[g[-1] if g else torch.zeros_like(w) for g, w in zip(plain.grads, gen.weights, strict=True)]]
        assert torch.equal(gen.history[-1], gen.flatten(history[0]))


def assert_same_state(a, b):
    """The same bits, except that t counts a step which changed nothing else, and that Adam may have made its zeros."""
    for key in a:
        if isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key]), key
    if "optimizer" in a.get("_extra_state", {}):
        before, after = (state["_extra_state"]["optimizer"]["state"] for state in (a, b))
        for k, values in after.items():
            for name, value in values.items():
                assert torch.equal(value, before[k][name]) if k in before else not value.any()


@pytest.mark.parametrize("name", WAYS)
@given(st.sampled_from(["dorefa", "bwn"]), loops, st.integers(0, 1000))
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_loop_does_what_the_plain_model_does(name, quantizer, loop, seed):
    check_loop(name, quantizer, loop, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Steps that are skipped.

ALL = UNLEARNED | MAKERS | RELEASED


def one_step(net, gen, t, spoil=None, update=True, scale=None):
    """A whole step. spoil: the number that one element of a gradient becomes; then W is not updated.

    scale: the largest magnitude that the gradient of the second layer gets.
    """
    if hasattr(gen, "look_ahead"):
        gen.look_ahead(0.01)
    backward(net, t)
    layers = models.binary_layers(net)
    if spoil is not None:
        layers[t % len(layers)].weight.grad.view(-1)[-1] = spoil
    if scale is not None:
        layers[1].weight.grad *= scale / layers[1].weight.grad.abs().max()
    gen.generate()
    for layer in layers if spoil is None and update else []:
        layer.weight.data -= 0.01 * layer.weight.grad


@pytest.mark.parametrize("name", ALL)
def test_steps_that_are_not_finite_leave_no_trace(name):
    """Training with such steps in between, the first two included, ends with the same bits as without them."""
    ends = []
    for bad in ({}, {0, 1, 3, 6, 7, 9}):
        net = network()
        torch.manual_seed(1)
        gen = ALL[name](models.binary_layers(net))
        gen.hyper_sample = 1.0  # the sample depends on the number of calls
        good = iter(range(8))
        for t in range(8 + len(bad)):
            if t in bad:
                one_step(net, gen, 100 + t, spoil=[float("nan"), float("inf")][t % 2])
                assert not all(w.grad.isfinite().all() for w in gen.weights), "a scaler must see it"
            else:
                one_step(net, gen, next(good))
        ends.append([*(layer.weight for layer in models.binary_layers(net)), *gen.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ["ste", "gate", "fsg-mamba", "multifc"])
def test_a_gradient_scaler_changes_nothing(name):
    """GradScaler starts with a scale that overflows, finds its own, and ends with the weights of a loop without it."""
    ends = []
    for scaled in (False, True):
        net = network(dtype=torch.float32)
        torch.manual_seed(1)
        gen = ALL[name](models.binary_layers(net))
        net.eval().requires_grad_(False)
        for w in gen.weights:
            w.requires_grad_()
        optimizer = torch.optim.Adam(gen.weights, 1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3, enabled=scaled)
        t = skipped = 0
        while t < 6:
            optimizer.zero_grad()
            x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(t))
            scaler.scale(F.cross_entropy(net(x), torch.arange(8) % 4)).backward()
            scaler.unscale_(optimizer)
            gen.generate()
            before = scaler.get_scale()
            scaler.step(optimizer), scaler.update()
            finite = scaler.get_scale() >= before
            t, skipped = t + finite, skipped + (not finite)
        assert skipped == 0 if not scaled else skipped > 1
        ends.append([*net.parameters(), *gen.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_a_step_that_a_scaler_skips_for_another_weight(name):
    """The gradients of the binary weights are finite: generate() counts them, as if the step had no learning rate."""
    ends = []
    for scaled in (False, True):
        net = network(dtype=torch.float32)
        torch.manual_seed(1)
        gen = ALL[name](models.binary_layers(net))
        gen.hyper_sample = 1.0  # a sample is drawn on the CPU in any case; this is faster
        other = next(p for p in net.parameters() if all(p is not w for w in gen.weights))
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for t in range(9):
            before = [w.detach().clone() for w in gen.weights]
            optimizer.zero_grad()
            if hasattr(gen, "look_ahead"):
                gen.look_ahead(0.01)
            x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(t))
            scaler.scale(F.cross_entropy(net(x), torch.arange(8) % 4)).backward()
            if t in (0, 3, 4):
                other.grad.view(-1)[0] = float("inf")
            scaler.unscale_(optimizer)
            gen.generate()
            if scaled or t not in (0, 3, 4):
                scaler.step(optimizer)
            scaler.update()
            moved = [not torch.equal(w, b) for w, b in zip(gen.weights, before, strict=True)]
            assert any(moved) == (t not in (0, 3, 4))
        ends.append([*net.parameters(), *gen.parameters()])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*ends, strict=True))


class NoWaiting(TorchDispatchMode):
    """Refuses the operations for which the host waits for the device: .item(), bool(), indexing with a mask."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select"), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*UNLEARNED, *(name for name in MAKERS if name not in ("fsg-flat", "fsg-sampled"))])
def test_generate_does_not_wait_for_the_device(name, monkeypatch):
    """Neither with finite gradients nor without; the flat reference scan and sampling need numbers on the host."""
    for module in (hypernet, gate):  # their own `where` looks at the condition, but on CPUs only
        monkeypatch.setattr(module, "where", torch.where)
    net = network()
    gen = ALL[name](models.binary_layers(net))
    for t in range(6):
        backward(net, t)
        gen.weights[t % 3].grad.view(-1)[0] *= float("inf") if t in (0, 4) else 1.0
        gen.weights[1].grad = None if t == 3 else gen.weights[1].grad
        with NoWaiting():
            gen.generate()
    with pytest.raises(AssertionError), NoWaiting():
        bool(gen.ghat.any())


# ---------------------------------------------------------------------------------------------------------------------
# Copies, other layers, wrong calls.


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ALL)
def test_a_copy_goes_on_as_the_original_does(name, how):
    net = network()
    gen = ALL[name](models.binary_layers(net))
    for t in range(3):
        one_step(net, gen, t)
    if how == "torch.save":
        torch.save((net, gen), file := io.BytesIO())
        file.seek(0)
        other, twin = torch.load(file, weights_only=False)
    else:
        other, twin = copy.deepcopy((net, gen)) if how == "deepcopy" else pickle.loads(pickle.dumps((net, gen)))
    assert all(a is b.weight for a, b in zip(twin.weights, models.binary_layers(other), strict=True)), "tied"
    for t in range(3, 6):
        one_step(net, gen, t), one_step(other, twin, t)
    for a, b in zip([*net.parameters(), *gen.parameters()], [*other.parameters(), *twin.parameters()], strict=True):
        assert a is not b and torch.equal(a, b)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_generator_is_not_copied_or_saved_at_the_look_ahead_weights(name):
    net = network()
    gen = ALL[name](models.binary_layers(net))
    one_step(net, gen, 0)
    state = copy.deepcopy(gen.state_dict())
    gen.look_ahead(0.1)
    for wrong in (gen.state_dict, lambda: copy.deepcopy(gen), lambda: gen.load_state_dict(state), gen.float):
        with pytest.raises(RuntimeError, match="after generate"):
            wrong()
    backward(net, 1)
    gen.generate()
    assert gen.t == 2


@pytest.mark.parametrize("name", ALL)
def test_a_layer_without_a_gradient_is_left_out(name):
    """Layer 0 is frozen with an old gradient, layer 1 has none: neither their weights nor their history change."""
    net = network()
    layers = models.binary_layers(net)
    gen = ALL[name](layers)
    for t in range(3):
        one_step(net, gen, t)
    n = [layer.weight.numel() for layer in layers]
    columns = lambda: copy.deepcopy({k: v.split(n, dim=-1)[:2] for k, v in gen.state_dict().items() if k == "history"})
    before, W = columns(), [layer.weight.detach().clone() for layer in layers[:2]]
    for t in range(3, 5):
        layers[0].weight.requires_grad_(False)
        if hasattr(gen, "look_ahead"):
            gen.look_ahead(0.01)
            assert torch.equal(W[0], layers[0].weight), "the forward pass sees a frozen weight where it is"
            assert torch.equal(W[1], layers[1].weight) or t == 3 or isinstance(gen, FastUpdate)
            assert not torch.equal(layers[2].weight, gen.displaced[2])
        backward(net, t)
        layers[0].weight.grad, layers[1].weight.grad = torch.ones_like(layers[0].weight), None
        gen.generate()
        assert layers[0].weight.grad.eq(1).all() and layers[1].weight.grad is None and layers[2].weight.grad.any()
        layers[2].weight.data -= 0.01 * layers[2].weight.grad
    for a, b in zip(before.get("history", []), columns().get("history", []), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, layer.weight) for a, layer in zip(W, layers, strict=False))
    assert all(p.isfinite().all() for p in gen.parameters()) and math.isfinite(gen.measure(0.01).get("step", 0))
    net.requires_grad_(False)
    for layer in layers:
        layer.weight.grad = None
    if name not in RELEASED:
        gen.generate()  # all are frozen: nothing to do


@pytest.mark.parametrize("name", RELEASED)
def test_the_look_ahead_leaves_out_a_layer_that_never_had_a_gradient(name):
    net = network()
    layers = models.binary_layers(net)
    gen, before = ALL[name](layers), layers[1].weight.detach().clone()
    for t in range(4):
        gen.look_ahead(0.01)
        assert torch.equal(layers[1].weight, before)
        backward(net, t)
        layers[1].weight.grad = None
        gen.generate()


@pytest.mark.parametrize("name", sorted(ALL.keys() - set(RELEASED)))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_get_what_float32_would_give_them(name, dtype):
    gens = []
    for kind in (dtype, torch.float32):
        layers = models.binary_layers(network(dtype=dtype).to(kind))
        torch.manual_seed(1)
        gens.append(ALL[name](layers))
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        for w, exact in zip(*(gen.weights for gen in gens), strict=True):
            w.grad = (3e-5 * torch.randn(w.shape, generator=g)).to(dtype)  # the squares underflow in float16
            exact.grad = w.grad.float()
        for gen in gens:
            gen.generate()
        for w, exact in zip(*(gen.weights for gen in gens), strict=True):
            assert w.grad.dtype == dtype and torch.equal(w.grad, exact.grad.to(dtype)) and exact.grad.any()


@pytest.mark.parametrize("name", sorted(ALL.keys() - set(RELEASED)))
def test_a_layer_without_weights(name):
    torch.manual_seed(1)
    layers = [nn.Linear(13, 16), nn.Linear(5, 0), nn.Linear(3, 6)]
    models.binarize_(nn.ModuleList(layers), first=True, last=True)
    gen = ALL[name](layers)
    for _ in range(4):
        for w in gen.weights:
            w.grad = torch.randn_like(w)
        gen.generate()
        assert all(w.grad.isfinite().all() for w in gen.weights)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_whose_gradient_is_zero_in_a_step(name, dtype):
    """As behind ReLUs that are all off. What is learned stays finite."""
    net = network(dtype=dtype)
    torch.manual_seed(1)
    gen = ALL[name](models.binary_layers(net))
    for t in range(9):
        one_step(net, gen, t, scale=0.0 if t in (0, 5) else None)
    assert all(p.isfinite().all() for p in [*gen.parameters(), *gen.weights])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [1e-17, 1e-21, 1e-24, 1e-44])
def test_a_layer_whose_gradient_is_nearly_zero(name, size):
    """Its squares underflow in float32."""
    net = network(dtype=torch.float32)
    torch.manual_seed(1)
    gen = ALL[name](models.binary_layers(net))
    for t in range(5):
        one_step(net, gen, t, scale=size)
        assert all(w.grad.isfinite().all() for w in gen.weights)
        assert gen.weights[1].grad.abs().max() <= 1e4 * max(size, 1e-18), "the balance does not make it large"
    assert all(p.isfinite().all() for p in [*gen.parameters(), *gen.weights])


@pytest.mark.parametrize("name", sorted(ALL.keys() - set(RELEASED)))
def test_a_write_to_the_gradient_of_one_layer_is_no_new_gradient_of_another(name):
    """As with an optimizer for some of the layers whose zero_grad() writes zeros."""
    net = network()
    gen = ALL[name](models.binary_layers(net))
    for t in range(3):
        one_step(net, gen, t)
    others = [w.grad.clone() for w in gen.weights[1:]]
    gen.weights[0].grad.zero_().add_(1)
    gen.generate()
    assert gen.given == [True] + [False] * len(others)
    assert all(torch.equal(w.grad, before) for w, before in zip(gen.weights[1:], others, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_generate_wants_a_new_backward(name):
    net = network()
    layers = models.binary_layers(net)
    gen = ALL[name](layers)
    sentence = (
        r"no binary layer has a gradient{}, the first of them being layer 0, BinaryConv2d\(4, 5.*: call loss.back"
    )
    with pytest.raises(RuntimeError, match=sentence.format("")):
        gen.generate()
    for t in range(3):
        one_step(net, gen, t)
        before, G = copy.deepcopy(gen.state_dict()), [w.grad.clone() for w in gen.weights]
        if name in RELEASED:
            gen.look_ahead(0.01)
        with pytest.raises(RuntimeError, match=sentence.format(r" since the last generate\(\)")):
            gen.generate()
        assert all(torch.equal(w.grad, g) for w, g in zip(gen.weights, G, strict=True))
        if name in RELEASED:  # a backward() puts it right
            backward(net, t)
            gen.generate()
        else:
            assert_same_state(before, gen.state_dict())


@pytest.mark.parametrize("name", ["gate", "fsg-mamba", "released"])
def test_a_network_whose_tensors_were_replaced(name):
    """load_state_dict(assign=True), channels_last: the same bits as without them."""
    ends = []
    for replaced in (False, True):
        net = network()
        torch.manual_seed(1)
        gen = ALL[name](models.binary_layers(net))
        for t in range(6):
            one_step(net, gen, t)
            if replaced and t == 2:
                net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
            if replaced and t == 3:
                net.to(memory_format=torch.channels_last)
            if replaced and t == 4:  # a new generator, whose weights lie in another order
                state, gen = copy.deepcopy(gen.state_dict()), ALL[name](models.binary_layers(net))
                gen.load_state_dict(state)
        ends.append([*net.parameters(), *gen.parameters()])
    assert all(relative(a, b) < 1e-12 for a, b in zip(*ends, strict=True))


def test_a_network_that_does_not_fit_any_more():
    net = network()
    layers = models.binary_layers(net)
    gen = FSG(layers, expand=2, d_state=1)
    backward(net, 0)
    layers[1].float()
    with pytest.raises(
        RuntimeError, match=r"layer 1, BinaryConv2d\(5, 3.*has another device or data type.*whole network"
    ):
        gen.generate()
    net.double()
    with pytest.raises(RuntimeError, match="without assign=True"):
        gen.load_state_dict(gen.state_dict(), assign=True)
    layers.append(copy.deepcopy(layers[0]))
    with pytest.raises(RuntimeError, match=r"layers have changed since .*: make a new one"):
        gen.generate()


def test_layers_may_be_a_module_list():
    layers = nn.ModuleList(models.binary_layers(network()))
    gen = FSG(layers, expand=2, d_state=1)
    weights = {id(layer.weight) for layer in layers}
    assert not any(id(p) in weights for p in gen.parameters()), "they are the model's"


def test_mamba_without_its_kernels_says_so_once(monkeypatch):
    monkeypatch.setattr(hypernet, "selective_scan", None)
    layers = models.binary_layers(network(dtype=torch.float32))
    with warnings.catch_warnings(record=True) as found:
        for scan in ("auto", "reference"):
            gen = FSG(layers, expand=2, d_state=1, scan=scan)
            for _ in range(3):
                for layer in layers:
                    layer.weight.grad = torch.ones_like(layer.weight)
                gen.generate()
        FSG(layers, "lstm", hidden=2)
    (only,) = found
    assert "copy selective_scan.py, selective_scan_cpu.cpp and selective_scan_triton.py" in str(only.message)


# ---------------------------------------------------------------------------------------------------------------------
# Schedulers, processes.


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_gate_has_no_momentum_whatever_a_scheduler_does(kind):
    net = network()
    layers = models.binary_layers(net)
    gate = GatedHistory(layers)
    if kind == "adam":
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    else:
        optimizer = torch.optim.SGD(net.parameters(), 1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3)
    assert gate.without_momentum(optimizer) is optimizer
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9)  # changes the momentum as well
    for t in range(8):
        if t == 4:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        backward(net, t)
        gate.generate()
        optimizer.step(), scheduler.step()
        for p in net.parameters():
            latent, state = any(p is w for w in gate.weights), optimizer.state[p]
            if kind == "adam":
                assert torch.equal(state["exp_avg"], p.grad) == latent, "β₁ is 0 for the latent weights alone"
            else:
                assert (state.get("momentum_buffer") is None) == latent
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(list(net.parameters())) and all(group["lr"] != 1e-2 for group in optimizer.param_groups)
    named = gate.without_momentum(torch.optim.Adam(net.named_parameters(), 1e-2))
    known = {id(p): name for name, p in net.named_parameters()}
    assert all(group["param_names"] == [known[id(p)] for p in group["params"]] for group in named.param_groups)
    only = gate.without_momentum(torch.optim.Adam(gate.weights, 1e-2))
    assert [group["betas"] for group in only.param_groups] == [(0.0, 0.999)]
    with pytest.raises(ValueError, match="none of the latent weights"):
        gate.without_momentum(torch.optim.Adam(network().parameters()))


SHARED = """
    import os, sys, torch, torch.distributed as dist
    from gate import GatedHistory
    from hypernet import FSG
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    layers = [torch.nn.Linear(7, 5), torch.nn.Linear(3, 4)]
    for layer in layers: layer.quantizer = "dorefa"
    for generator in (FSG(layers, expand=2, d_state=2), GatedHistory(layers)):
        for t in range(6):
            for layer in layers: layer.weight.grad = torch.randn(layer.weight.shape)
            if t % 3 == 0: layers[t // 3].weight.grad.view(-1)[-1] = float("inf")  # in another process's part each time
            ghats = [layer.weight.grad.clone() for layer in layers]
            generator.generate()
            kept = [torch.equal(layer.weight.grad, g) for layer, g in zip(layers, ghats)]
            assert kept == [t % 3 == 0] * 2, (t, kept)
        if rank == 0:
            try: generator.state_dict()
            except RuntimeError as e: assert "gather()" in str(e)
            else: raise AssertionError
        generator.gather()
        if rank == 0:
            torch.save(generator.state_dict(), sys.argv[1] + type(generator).__name__)
        phi = torch.cat([torch.zeros(1), *(p.detach().flatten() for p in generator.parameters())])
        theirs = phi.clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(phi, theirs) and phi.isfinite().all()
    dist.barrier(), os._exit(0)  # gloo's threads sometimes abort a process that ends in another way
"""


def test_one_process_alone_saves_what_all_have_gathered(tmp_path):
    codes, outputs = launch(2, "-c", textwrap.dedent(SHARED), str(tmp_path / "state-"))
    assert codes == [0, 0], outputs
    layers = [nn.Linear(7, 5), nn.Linear(3, 4)]
    for layer in layers:
        layer.quantizer = "dorefa"
    for generator in (FSG(layers, expand=2, d_state=2), GatedHistory(layers)):
        generator.load_state_dict(torch.load(tmp_path / f"state-{type(generator).__name__}", weights_only=True))
        assert generator.latent.abs().min() > 0, "all 47 weights"
        for layer in layers:
            layer.weight.grad = torch.randn_like(layer.weight)
        generator.generate()
