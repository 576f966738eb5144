"""The gated history: fast and slow gradients for binary networks, without hypernetworks. It is not from a paper.

Copy this file with hypernet.py. The class has the interface of FSG:

    gate = GatedHistory(layers)                       # binarize.binary_layers(model)
    # 6e-3 from random weights; 1e-3 from a full-precision network
    optimizer = gate.without_momentum(torch.optim.Adam(model.parameters(), 6e-3))
    …backward(); gate.generate(); optimizer.step()
"""

import torch
from torch import Tensor, nn

from hypernet import Generator, where


class GatedHistory(Generator):
    """A gradient of the present and of the past since the weight's last flip:

        h_t  = ĝ_t + λ·[sign W_t = sign W_{t−1}]·h_{t−1}      the history; a flip (a change of sign) clears it
        r    = |W| / RMS(W)                                    distance to the threshold; the RMS of the layer
        fast = ĝ_t / (ε + r)
        slow = (h_t − ĝ_t) / (ε + r)
        G    = D ⊙ (fast + slow)

    *A weight that approaches its threshold takes longer steps.* r is the distance of a weight from W = 0, where its
    sign changes. The factor 1 / (ε + r) grows as a weight approaches 0, so the weight changes its sign instead of
    staying near 0. (Adam divides out a constant factor per weight. This factor has an effect because it changes.)
    *A flip clears the history.* Averaging over past gradients reduces noise. But gradients from before a flip were
    measured at the other sign of the weight. They would move the weight further before a gradient is measured at the
    new sign.
    The history acts as momentum, so the optimizer must have none for these weights (`without_momentum`).

    λ and ε were chosen by the test accuracy of whole training runs on CIFAR-10. They are not learned, because FSG's
    objective depends only on the loss of the next step. It prefers small or reversed steps where successive gradients
    are anti-correlated (short-horizon bias, https://arxiv.org/abs/1803.02021).

    layers: as for Generator. memory: λ in [0, 1); 0 is no history. epsilon: ε > 0.
    Raises ValueError for other values. Memory: about 11 N elements, 6 N of them between steps.
    """

    keeps_latent = True  # sign W_{t−1}

    def __init__(self, layers: list[nn.Module], memory: float = 0.8, epsilon: float = 0.35):
        if not 0 <= memory < 1 or not epsilon > 0:
            raise ValueError(f"memory must be at least 0 and below 1, epsilon above 0; they are {memory} and {epsilon}")
        super().__init__(layers, sharded=True)
        self.memory, self.epsilon = memory, epsilon
        self.register_buffer("past", torch.zeros_like(self.latent))  # h_t

    @torch.no_grad()
    def generate(self) -> None:
        """`weight.grad` ← G for every layer with a gradient.

        If any element of ĝ_t is not finite, h does not change, and ĝ_t stays in `weight.grad`.
        """
        self.follow()
        positive = self.latent >= 0  # the signs one step ago; sign(0) is +1
        new = self.collect()
        same_sign = (self.latent >= 0) == positive
        past = self.ghat + torch.where(same_sign, self.memory * self.past, 0)
        self.past = where(new, past, self.past)
        self.hand_back(where(new, self.scale().mul_(past), self.ghat))

    def scale(self) -> Tensor:
        """D / (ε + r): [N]. The threshold is W = 0 under all quantizers."""
        D, _ = self.calibrate(pre=False)
        r = self.latent.abs().div_(self.spread(self.rms(self.latent.unsqueeze(0))))
        return D.div_(r.add_(self.epsilon))

    def terms(self) -> tuple[Tensor, ...]:
        scale = self.scale()
        return scale * self.ghat, scale * (self.past - self.ghat)

    def without_momentum(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Switch momentum off for the latent weights in an optimizer, and return the optimizer.

        Call it before you make a learning rate scheduler, because it moves the latent weights to separate parameter
        groups. `momentum`, or β₁ of `betas`, is set to 0 in these groups before every step. So a scheduler that changes
        it, as OneCycleLR does by default, changes it for the other weights only.
        Raises ValueError if the optimizer has none of the latent weights.
        """

        ours = {id(w) for w in self.weights}

        def latent(group: dict) -> list[Tensor]:
            return [p for p in group["params"] if id(p) in ours]

        def part(group: dict, is_latent: bool) -> dict:
            """The latent weights in a group, or its other weights; with their names, if it has names."""
            at = [i for i, p in enumerate(group["params"]) if (id(p) in ours) == is_latent]
            return {name: [group[name][i] for i in at] for name in ("params", "param_names") if name in group}

        def switch_off(optimizer, *_) -> None:
            for group in filter(latent, optimizer.param_groups):
                if "momentum" in group:
                    group["momentum"] = 0.0
                if "betas" in group:
                    group["betas"] = (0.0, *group["betas"][1:])

        if not any(map(latent, optimizer.param_groups)):
            raise ValueError("the optimizer has none of the latent weights of the gated history: add them to it")
        for group in list(optimizer.param_groups):
            if 0 < len(latent(group)) < len(group["params"]):
                separate = part(group, True)
                group.update(part(group, False))
                optimizer.add_param_group({**group, **separate})
        optimizer.param_groups.sort(key=lambda group: not latent(group))  # the latent weights first
        optimizer.register_step_pre_hook(switch_off)
        switch_off(optimizer)
        return optimizer
