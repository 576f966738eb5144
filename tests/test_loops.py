"""The gradient generators in other people's training loops: skipped steps, frozen layers, copies, schedulers."""

import copy
import io
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

import hypernet
import models
import quantizers
from gate import GatedHistory
from hypernet import FSG, STE
from metaquant import LSTMFC, MultiFC

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
            self.state = [
                (w.new_zeros(w.numel(), 6),) * 2 if s is None else s for s, w in zip(self.state, weights, strict=True)
            ]
            for i, W in enumerate(self.latents):
                pre = quantizers.pre_quantize(W, self.layers[i].quantizer).reshape(-1, 1)
                self.next_state[i] = [x.detach() for x in self.nets.cell(pre, self.state[i])]
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
change = st.sampled_from(["again", "deepcopy", "pickle", "load", "assign", "channels_last", "contiguous"])
freeze = st.tuples(st.sampled_from(["freeze", "thaw"]), st.integers(0, 2))
loops = st.lists(st.one_of(step, step, good, good, st.tuples(change), freeze), min_size=3, max_size=14)
WAYS = {
    "ste": STE,
    "gate": GatedHistory,
    "fsg-mamba": lambda layers: small_fsg(layers, expand=2, d_state=2, fast_act="tanh"),
    "fsg-flat": lambda layers: small_fsg(layers, history="flat", expand=2, d_state=2, fast_act="tanh"),
    "fsg-as-written": lambda layers: small_fsg(layers, expand=2, d_state=2, balance="none"),
    "multifc": lambda layers: MultiFC(layers, 6, "tanh"),
    "lstmfc": lambda layers: LSTMFC(layers, 6),
}


def check_loop(name, quantizer, loop, seed):
    make = WAYS[name]
    net = make_layers(quantizer)
    gen = make(list(net))
    plain = Plain(name, gen, net)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    random = torch.Generator().manual_seed(seed)
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
                    assert torch.allclose(w.grad, G, 0, 0, equal_nan=True) if bad else relative(w.grad, G) < 1e-8 or not G.any()
            if bad:
                assert_same_state(before, gen.state_dict())
            if update and not bad:
                optimizer.step()
        elif what == "again" and any(w.requires_grad for w in gen.weights):
            with pytest.raises(RuntimeError, match="no binary layer has a gradient"):
                optimizer.zero_grad() if random.initial_seed() % 2 else None
                gen.generate(), gen.generate()  # the first raises already where a generate() went before
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
        elif what in ("channels_last", "contiguous"):
            net.to(memory_format=torch.channels_last if what == "channels_last" else torch.contiguous_format)
    if name not in UNLEARNED:
        for a, b in zip(gen.parameters(), plain.nets.parameters(), strict=True):
            assert relative(a, b) < 1e-7
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
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_loop_does_what_the_plain_model_does(name, quantizer, loop, seed):
    check_loop(name, quantizer, loop, seed)
