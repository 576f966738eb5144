"""FSG as its authors' code trains it (https://github.com/two-tiger/FSG): the look-ahead step, `--preset released`.

Copy this file with hypernet.py. The paper's text has one update (hypernet.FSG). The released code has two:

    forward and backward at    W − lr·((1 − β)·D ⊙ fast + β·slow)        the look-ahead weights; no D at the slow term
    the update of W            G = D ⊙ fast                              the slow gradient never enters it

where fast and slow are made of the gradient that was measured one step before. So φ is trained through the look-ahead,
and the slow gradient acts only through the weights at which the next gradient is measured.

    fsg = ReleasedFSG(layers)
    for images, labels in batches:
        fsg.look_ahead(lr)                                            # moves the weights
        F.cross_entropy(model(images), labels).backward()
        fsg.generate()                                                # moves them back; w.grad = D ⊙ fast
        optimizer.step(), optimizer.zero_grad()
"""

import torch
from torch import Tensor, nn

from hypernet import FSG, FastNet, Seen


class ReleasedFSG(FSG):
    """FSG with the released code's look-ahead and settings.

    The history is flat, nothing is normalised or balanced, and the linear MLP starts as nn.Linear does.

    layers, length, beta, hidden, d_state, d_conv, expand, scan, lr_fast, lr_slow: see FSG.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        length: int = 5,
        beta: float = 0.9,
        hidden: int = 100,
        d_state: int = 16,
        d_conv: int = 8,
        expand: int = 100,
        scan: str = "auto",
        lr_fast: float = 1e-2,
        lr_slow: float = 1e-3,
    ):
        super().__init__(
            layers,
            length=length,
            beta=beta,
            history="flat",
            normalize="none",
            balance="none",
            hidden=hidden,
            fast_act="none",
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            scan=scan,
            lr_fast=lr_fast,
            lr_slow=lr_slow,
        )
        self.terms_made = None  # fast and slow [N], with their graph to φ, of the last gradient
        self.displaced = None  # the persistent weights, while the model stands at the look-ahead weights

    def start(self) -> None:
        self.fast = FastNet(self.fast.linears[0].out_features, "none").to(self.fast.ends.device)
        super().start()

    def gradient(self, seen: Seen) -> Tensor:
        """fast [N]; fast and slow are kept for look_ahead, which mixes them with the D of the weights that it finds."""
        self.terms_made = self.fast_gradient(seen), self.slow_gradient(seen)
        return self.terms_made[0]

    @torch.no_grad()
    def look_ahead(self, lr: float) -> None:
        """Before the forward pass: move the weights to the look-ahead weights.

        Does nothing before the first generate().
        Raises RuntimeError where it is called twice without generate().
        """
        if self.displaced is not None:
            raise RuntimeError("look_ahead() was called twice: call it once before each forward pass")
        if self.graph is None:
            return
        self.latent = self.flatten(self.weights)
        D, _ = self.calibrate()
        fast, slow = self.terms_made
        with torch.enable_grad():
            self.graph = (1 - self.beta) * D * fast + self.beta * slow
        self.update = D * fast.detach()
        self.displaced = [w.detach().clone() for w in self.weights]
        moves = self.layer_views(self.shard.all_gather(self.graph.detach()))
        torch._foreach_sub_([w.detach() for w in self.weights], torch._foreach_mul(moves, lr))

    @torch.no_grad()
    def generate(self) -> None:
        """Train φ through the look-ahead, move the weights back, and set every `weight.grad` to D ⊙ fast.

        The first call gives D ⊙ ĝ. Raises RuntimeError where look_ahead() was not called before the forward pass.
        """
        if self.t and self.displaced is None:
            raise RuntimeError("preset 'released' wants look_ahead(lr) before every forward pass")
        self.collect()  # ĝ, and the look-ahead weights where it was measured
        D, pre = self.calibrate()
        if self.displaced is None:
            self.update = D * self.ghat
        else:
            self.train_phi(-D * self.ghat)
            torch._foreach_copy_([w.detach() for w in self.weights], self.displaced)
            self.displaced = None
        self.push()
        self.make(D, pre)
        self.hand_back(self.update)

    def measure(self, lr: float) -> dict[str, float]:
        """Empty: ĝ is measured elsewhere than where the weights are."""
        return {}

    @torch.no_grad()
    def _rebuild(self) -> None:
        self.graph = None
        if self.t:
            self.make(*self.calibrate())
