"""MetaQuant's gradient generators: FCGrad, MultiFC and LSTMFC.

Paper: MetaQuant: Learning to Quantize by Learning to Penetrate Non-differentiable Quantization (NeurIPS 2019),
https://papers.nips.cc/paper_files/paper/2019/hash/f8e59f4b2fe7c5705bf878bbd494ccdf-Abstract.html

Copy this file with hypernet.py. The generators have the interface of FSG, and their φ is trained as FSG's:

    generator = MultiFC(layers)                       # binarize.binary_layers(model)
    …backward(); generator.generate(); optimizer.step()

These classes are a simple form: G_t is made of the gradient ĝ_t that was measured at the present weights, and φ starts
so that G is the straight-through gradient. MetaQuant's released code (https://github.com/csyhhu/MetaQuant) differs, see
LookAhead. ReleasedFCGrad, ReleasedMultiFC and ReleasedLSTMFC repeat it step by step:

    generator = ReleasedMultiFC(layers)
    optimizer = AuthorsAdam(model.parameters(), lr, weight_decay=5e-4)
    for images, labels in batches:
        generator.look_ahead(lr)                                     # moves the weights
        F.cross_entropy(model(images), labels).backward()
        generator.generate()                                         # moves them back; w.grad = G
        if generator.t > 1: optimizer.step()                         # no update in the first step
        optimizer.zero_grad()
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from hypernet import FastNet, Generator, Learned, Seen, elements_at_once, exact, fast_net, in_chunks, per_layer


class FCGrad(Learned):
    """G = D ⊙ FC(ĝ). FC is an MLP 1 → hidden → 1 and starts as the identity.

    hidden, act: see FastNet. lr: Adam's learning rate for φ.
    """

    def __init__(self, layers: list[nn.Module], hidden: int = 100, act: str | None = None, lr: float = 1e-3):
        super().__init__(layers)
        self.lr = lr
        self.make_nets(hidden, act)
        self.start()

    def make_nets(self, hidden: int, act: str | None) -> None:
        self.fast = FastNet(hidden, act or "none", depth=2)
        self.fast.start_at({1e-3: 1e-3, -1e-3: -1e-3})

    def gradient(self, seen: Seen) -> Tensor:
        return seen.D * self.fast(seen.ghat)


class MultiFC(Learned):
    """G = D ⊙ ĝ ⊙ MLP(W̃). The MLP is 1 → hidden → hidden → 1 and starts at 1, as STE.

    hidden, act: see hypernet.fast_net. lr: Adam's learning rate for φ.
    """

    def __init__(self, layers: list[nn.Module], hidden: int = 100, act: str | None = None, lr: float = 1e-3):
        super().__init__(layers)
        self.lr = lr
        self.make_nets(hidden, act)
        self.start()

    def make_nets(self, hidden: int, act: str | None) -> None:
        self.fast = fast_net(self.kind, hidden, act)

    def gradient(self, seen: Seen) -> Tensor:
        return seen.D * seen.ghat * self.fast(seen.pre)


class LSTMFC(Learned):
    """G = D ⊙ ĝ ⊙ FC(LSTM(W̃)). Every weight has its own LSTM state, which is kept from step to step. Starts near STE.

    hidden: size of the state. lr: Adam's learning rate for φ. Memory: up to three copies of 2·hidden·N elements.
    """

    def __init__(self, layers: list[nn.Module], hidden: int = 100, lr: float = 1e-3):
        super().__init__(layers)
        self.lr, self.hidden = lr, hidden
        self.make_nets(hidden)
        # The state before the last step. `next_state`, the state after it, can be computed again from this one.
        self.register_buffer("state", self.latent.new_zeros(2, len(self.latent), hidden))
        self.next_state = None
        self.start()

    def make_nets(self, hidden: int) -> None:
        self.cell = nn.LSTMCell(1, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.ones_(self.out.bias)

    def push(self, new: Tensor) -> None:
        if self.next_state is not None:  # None until the first G is made
            self.state = torch.where(self.spread(self.learned()).unsqueeze(1), self.next_state, self.state)
        super().push(new)

    def gradient(self, seen: Seen) -> Tensor:
        return seen.D * seen.ghat * self.lstm(seen.pre)

    def lstm(self, pre: Tensor) -> Tensor:
        """FC(LSTM(W̃)) for W̃ [N]: [N]. The new state of every weight becomes `next_state`."""
        rows, cell, out = elements_at_once(pre.device) // self.hidden, self.cell, self.out

        # The graph keeps `step`. A reference to self in it would keep the generator in memory.
        def step(pre: Tensor, h: Tensor, c: Tensor) -> Tensor:
            """W̃ [M], h and c [M, hidden] -> [M, 1 + 2·hidden]: FC(h), and the new h and c."""
            h, c = cell(pre.unsqueeze(1), (h, c))
            return torch.cat([out(h), h.detach(), c.detach()], dim=1)

        found = in_chunks(step, rows, self.parameters(), pre, *self.state)  # [N, 1 + 2·hidden]
        self.next_state = found[:, 1:].detach().unflatten(1, (2, self.hidden)).transpose(0, 1)  # [2, N, hidden]
        return found[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# As released. FSG's released code (fsg_released.py) has this training step too.


class LookAhead(Learned):
    """The training step of MetaQuant's released code. A subclass of this class and of a generator has both.

    In step t > 1, with ĝ_{t−1} and W̃_{t−1} measured at the look-ahead weights of step t − 1:

        G_t                          made of ĝ_{t−1} and W̃_{t−1}, with the D of the weights W_t
        forward and backward at      W_t − lr·R_{t−1}
        φ's gradient                 −lr·∂Ŵ/∂W ⊙ ĝ_t, back-propagated through the graph of G_t; nothing is normalised
        the optimizer receives       G_t

    R_{t−1}, the refined gradient, is the direction in which the optimizer moved the weights one step before:
    W_t = W_{t−1} − lr·R_{t−1}. In step 2 it is ∂Ŵ/∂W ⊙ ĝ_1. The biases of the binary layers look ahead along their
    refined gradient, and in step 2 along their gradient. Other parameters do not look ahead.
    Step 1 has no look-ahead and no update: call optimizer.step() only if t > 1.
    φ has the random initialisation of torch.nn.
    If any element of ĝ_t is not finite, generate() moves the weights back and changes nothing else. The host waits for
    the device to find this out.

    Attributes: t, the number of generate() calls with a finite ĝ. Memory: about 5 N elements more than the simple form.
    """

    SHARDED: ClassVar = Generator.SHARDED | {"before": 0}
    ATTRIBUTES = (*Learned.ATTRIBUTES, "step_size")
    displaced = None  # the weights and biases to restore, between look_ahead() and generate()
    undo = ()  # latent, before, bias_before and step_size before look_ahead()

    def __init__(self, layers: list[nn.Module], *arguments, **options):
        super().__init__(layers, *arguments, **options)
        has_bias = lambda layer: getattr(layer, "bias", None) is not None and layer.bias.requires_grad
        self.with_bias = [layer for layer in layers if has_bias(layer)]
        self.step_size = 0.0  # lr of the last step
        self.register_buffer("before", torch.zeros_like(self.latent))  # W_{t−1}
        self.register_buffer("bias_before", self.flat_biases(torch.zeros_like))
        self.register_buffer("bias_gradient", self.flat_biases(torch.zeros_like))  # of step 1

    @property
    def biases(self) -> list[nn.Parameter]:
        return [layer.bias for layer in self.with_bias]

    def flat_biases(self, of) -> Tensor:
        """of(bias) of all biases of binary layers, laid end to end."""
        return torch.cat([self.latent.new_empty(0), *(of(b).detach().flatten() for b in self.biases)])

    @exact
    def look_ahead(self, lr: float) -> None:
        """Before the forward pass: make G_t and move the weights to the look-ahead weights.

        It has no effect before the first generate().
        Raises RuntimeError if it is called twice without generate().
        """
        if self.displaced is not None:
            raise RuntimeError("look_ahead() was called twice: call it once before each forward pass")
        self.follow()
        if self.t == 0:
            return
        self.gathered, self.undo = None, (self.latent, self.before, self.bias_before, self.step_size)
        _, pre = self.calibrate()  # W̃_{t−1}, at the weights where ĝ_{t−1} was measured
        self.latent = self.flatten(self.weights)
        D, _ = self.calibrate()
        self.make(D, pre)
        bias = self.flat_biases(lambda b: b)
        refined = self.bias_gradient if self.t == 1 else self.last_direction(self.bias_before, bias)
        directions = self.layer_views(self.shard.all_gather(self.trial(D)))
        directions = [
            d if w.requires_grad else torch.zeros_like(d) for d, w in zip(directions, self.weights, strict=True)
        ]
        parts = refined.split([b.numel() for b in self.biases]) if self.biases else []
        directions += [part.view_as(b) for part, b in zip(parts, self.biases, strict=True)]
        self.before, self.bias_before, self.step_size = self.latent, bias, float(lr)

        moved = [p.detach() for p in (*self.weights, *self.biases)]
        self.displaced = [p.clone() for p in moved]
        torch._foreach_sub_(moved, torch._foreach_mul(directions, lr))

    def trial(self, D: Tensor) -> Tensor:
        """R_{t−1}, the direction of the look-ahead: [n]."""
        if self.t == 1:
            return self.derivative() * self.history[-1]
        return self.last_direction(self.before, self.latent)

    def last_direction(self, before: Tensor, after: Tensor) -> Tensor:
        """R of the last step: after = before − lr·R. 0 where lr was 0."""
        return (before - after) / max(self.step_size, 1e-300)

    def update(self) -> Tensor:
        """What the optimizer receives: [n]."""
        return self.last_G.detach()

    @exact
    def generate(self) -> None:
        """Train φ through the look-ahead, move the weights back, and set every `weight.grad` to G_t.

        The first call gives D ⊙ ĝ. Raises RuntimeError if look_ahead() was not called before the forward pass.
        """
        if self.t and self.displaced is None:
            raise RuntimeError("a released generator needs a call of look_ahead(lr) before every forward pass")
        new = self.collect()  # ĝ, and the look-ahead weights where it was measured
        finite = bool(self.new.any())
        if self.displaced is None:
            D, _ = self.calibrate()
            G = D * self.ghat
            self.bias_gradient = self.flat_biases(lambda b: torch.zeros_like(b) if b.grad is None else b.grad)
            finite = finite and bool(self.bias_gradient.isfinite().all())
        else:
            G = self.update()
            v = torch.where(self.spread(self.learned()), -self.step_size * self.derivative() * self.ghat, 0)
            self.train_phi(v, self.learned().any())
            torch._foreach_copy_([p.detach() for p in (*self.weights, *self.biases)], self.displaced)
            latent, *others = self.undo
            self.latent = torch.where(new, self.latent, latent)
            if not finite:
                self.before, self.bias_before, self.step_size = others
            self.displaced, self.undo = None, ()
        if finite:
            self.push(new)
            self.t += 1
            self.hand_back(G)

    def learned(self) -> Tensor:
        return self.new & (self.steps > 0)

    def derivative(self) -> Tensor:
        """∂Ŵ/∂W straight through the sign, at the weights where ĝ was measured: [n].

        It is D, except for bwn-l: there it is mean|W| where |W| ≤ 1, else 0. (In the authors' update, D is still 1.)
        """
        if self.kind != "bwn-l":
            return self.calibrate()[0]
        size = self.latent.abs()
        mean = self.shard.all_reduce(per_layer(size, self.sizes, self.lengths)) / self.layer_size
        return self.spread(mean) * (size <= 1)

    def measure(self, lr: float) -> dict[str, float]:
        """Empty, because ĝ is measured at other weights than those of the network."""
        return {}

    def rebuild(self) -> None:
        """look_ahead() makes the graph."""

    def must_stand_back(self) -> None:
        if self.displaced is not None:
            raise RuntimeError(
                "the weights are displaced: copy, move, save or load a released generator before look_ahead() or after "
                "generate()"
            )

    def _apply(self, fn, recurse=True):
        self.must_stand_back()
        return super()._apply(fn, recurse)

    def __getstate__(self):
        self.must_stand_back()
        return super().__getstate__()

    def get_extra_state(self) -> dict:
        self.must_stand_back()
        return super().get_extra_state()

    def _load_from_state_dict(self, *args):
        self.must_stand_back()
        super()._load_from_state_dict(*args)


class ReleasedFCGrad(LookAhead, FCGrad):
    """FCGrad as released. The arguments are FCGrad's."""

    def make_nets(self, hidden: int, act: str | None) -> None:
        self.fast = FastNet(hidden, act or "none", depth=2)


class ReleasedMultiFC(LookAhead, MultiFC):
    """MultiFC as released. The arguments are MultiFC's; `act` is 'none' by default, and there are no biases."""

    def make_nets(self, hidden: int, act: str | None) -> None:
        self.fast = FastNet(hidden, act or "none")


class ReleasedLSTMFC(LookAhead, LSTMFC):
    """LSTMFC as released. The arguments are LSTMFC's."""

    def make_nets(self, hidden: int) -> None:
        self.cell, self.out = nn.LSTMCell(1, hidden), nn.Linear(hidden, 1)


class AuthorsAdam(torch.optim.Optimizer):
    """Adam (https://arxiv.org/abs/1412.6980) as in MetaQuant's and FSG's released codes.

        p ← p − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ)·m / (√v + ε)

    torch.optim.Adam adds ε to √v after its bias correction. Here ε has up to 30 times the effect in the first steps.
    params, lr, betas, eps, weight_decay (added to the gradient): as in torch.optim.Adam.
    """

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads, (beta1, beta2) = [p.grad for p in params], group["betas"]
            if group["weight_decay"]:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p]["step"] += 1
            m, v = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            divisor = torch._foreach_sqrt(v)
            torch._foreach_add_(divisor, group["eps"])
            steps = [self.state[p]["step"] for p in params]
            scale = [-group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t) for t in steps]
            torch._foreach_addcdiv_(params, m, divisor, scale)
        return loss
