"""FSG as its authors' code trains it (https://github.com/two-tiger/FSG), step by step: `--preset released`.

Copy this file with hypernet.py and metaquant.py. The paper has one update (hypernet.FSG). The released code moves the
weights twice. Its step is that of metaquant.LookAhead with

    forward and backward at    W − lr·((1 − β)·D ⊙ fast + β·slow)        the look-ahead weights; no D at the slow term
    the update of W            G = D ⊙ fast                              without the slow gradient

Here fast and slow are made of the gradient that was measured one step before. So φ is trained through the look-ahead.
The slow gradient has an effect only on the weights at which the next gradient is measured.

    fsg = ReleasedFSG(layers)
    optimizer = metaquant.AuthorsAdam(model.parameters(), lr)         # or torch.optim.SGD
    for images, labels in batches:
        fsg.look_ahead(lr)                                            # moves the weights
        F.cross_entropy(model(images), labels).backward()
        fsg.generate()                                                # moves them back; w.grad = D ⊙ fast
        if fsg.t > 1: optimizer.step()                                # no update in the first step
        optimizer.zero_grad()
"""

from torch import Tensor, nn

from hypernet import FSG, FastNet, Seen
from metaquant import LSTMFC, LookAhead


class FastUpdate(LookAhead):
    """A look-ahead along (1 − β)·D ⊙ fast + β·slow, and an update with D ⊙ fast."""

    def mix(self, D: Tensor, fast: Tensor, slow: Tensor) -> Tensor:
        """The direction of the look-ahead: [n]."""
        self.fast_update = D * fast.detach()
        return (1 - self.beta) * D * fast + self.beta * slow

    def trial(self, D: Tensor) -> Tensor:
        return self.last_G.detach()

    def update(self) -> Tensor:
        return self.fast_update


class ReleasedFSG(FastUpdate, FSG):
    """FSG with Mamba, as released.

    The history is flat and starts empty: it contains min(t, l) gradients. Nothing is normalised or balanced. The linear
    MLP has the initialisation of nn.Linear.

    layers, length, beta, hidden, d_state, d_conv, expand, scan, lr_fast, lr_slow: see FSG. Raises ValueError as FSG.
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

    def start(self) -> None:
        self.fast = FastNet(self.fast.linears[0].out_features, "none").to(self.fast.ends.device)
        super().start()

    def gradient(self, seen: Seen) -> Tensor:
        seen = seen._replace(history=seen.history[-self.t :])  # the window grows from 1 to l gradients
        return self.mix(seen.D, self.fast_gradient(seen), self.slow_gradient(seen))


class ReleasedFSGLSTM(FastUpdate, LSTMFC):
    """FSG with the LSTM of the released code. It is not an LSTM over the history:

        slow = ĝ ⊙ FC(LSTM(W̃))         every weight has its own LSTM state, as in metaquant.LSTMFC

    There is no history and no layer embedding.

    layers, beta, hidden, lr_fast, lr_slow: see FSG. lstm_hidden: size of the state; `hidden` by default.
    Raises ValueError if beta is outside [0, 1].
    """

    def __init__(
        self,
        layers: list[nn.Module],
        beta: float = 0.9,
        hidden: int = 100,
        lstm_hidden: int | None = None,
        lr_fast: float = 1e-2,
        lr_slow: float = 1e-3,
    ):
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is the weight of the slow gradient and must lie in [0, 1]; it is {beta}")
        self.beta, self.lr_fast, self.fast_hidden = beta, lr_fast, hidden
        super().__init__(layers, lstm_hidden or hidden, lr_slow)

    def make_nets(self, hidden: int) -> None:
        self.fast = FastNet(self.fast_hidden, "none")
        self.cell, self.out = nn.LSTMCell(1, hidden), nn.Linear(hidden, 1)

    def parameter_groups(self) -> list[dict]:
        slow = [*self.cell.parameters(), *self.out.parameters()]
        return [{"params": list(self.fast.parameters()), "lr": self.lr_fast}, {"params": slow, "lr": self.lr}]

    def gradient(self, seen: Seen) -> Tensor:
        return self.mix(seen.D, seen.ghat * self.fast(seen.pre), seen.ghat * self.lstm(seen.pre))
