"""MetaQuant's gradient generators (NeurIPS 2019, https://arxiv.org/abs/1910.05898): FCGrad, MultiFC and LSTMFC.

Copy this file with hypernet.py. They are used as FSG is, and their φ is trained as FSG's is:

    generator = MultiFC(layers)                       # models.binary_layers(model)
    …backward(); generator.generate(); optimizer.step()

These are the simple form: G_t is made of the gradient that was measured at the present weights. MetaQuant's released
code measures it at look-ahead weights instead.
"""

import torch
from torch import Tensor, nn

from hypernet import FastNet, Learned, Seen, elements_at_once, fast_net, in_chunks


class FCGrad(Learned):
    """G = D ⊙ FC(ĝ), the network 1 → hidden → 1, which starts as the identity.

    hidden, act: see FastNet. lr: Adam's learning rate for φ.
    """

    def __init__(self, layers: list[nn.Module], hidden: int = 100, act: str | None = None, lr: float = 1e-3):
        super().__init__(layers)
        self.lr = lr
        self.fast = FastNet(hidden, act or "none", depth=2)
        self.fast.start_at({1e-3: 1e-3, -1e-3: -1e-3})
        self.start()

    def gradient(self, seen: Seen) -> Tensor:
        return seen.D * self.fast(seen.ghat)


class MultiFC(Learned):
    """G = D ⊙ ĝ ⊙ MLP(W̃), the MLP 1 → hidden → hidden → 1. It starts as STE.

    hidden, act: see hypernet.fast_net. lr: Adam's learning rate for φ.
    """

    def __init__(self, layers: list[nn.Module], hidden: int = 100, act: str | None = None, lr: float = 1e-3):
        super().__init__(layers)
        self.lr = lr
        self.fast = fast_net(self.kind, hidden, act)
        self.start()

    def gradient(self, seen: Seen) -> Tensor:
        return seen.D * seen.ghat * self.fast(seen.pre)


class LSTMFC(Learned):
    """G = D ⊙ ĝ ⊙ FC(LSTM(W̃)). Every weight carries its own LSTM state from step to step. It starts about as STE.

    hidden: size of the state. lr: Adam's learning rate for φ. Memory: up to three copies of 2·hidden·N elements.
    """

    def __init__(self, layers: list[nn.Module], hidden: int = 100, lr: float = 1e-3):
        super().__init__(layers)
        self.lr, self.hidden = lr, hidden
        self.cell = nn.LSTMCell(1, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.ones_(self.out.bias)
        # The state before the last step. The state after it is `next_state`; it can be computed again from this one.
        self.register_buffer("state", self.latent.new_zeros(2, len(self.latent), hidden))
        self.next_state = self.state
        self.start()

    def push(self) -> None:
        super().push()
        if self.next_state is not self.state:
            self.state.copy_(self.next_state)

    def gradient(self, seen: Seen) -> Tensor:
        rows = elements_at_once(seen.pre.device) // self.hidden
        found = in_chunks(self.step, rows, self.parameters(), seen.pre, *self.state)  # [N, 1 + 2·hidden]
        self.next_state = found[:, 1:].detach().unflatten(1, (2, self.hidden)).transpose(0, 1)  # [2, N, hidden]
        return seen.D * seen.ghat * found[:, 0]

    def step(self, pre: Tensor, h: Tensor, c: Tensor) -> Tensor:
        """W̃ [M], h and c [M, hidden] -> [M, 1 + 2·hidden]: FC(h), and the new h and c."""
        h, c = self.cell(pre.unsqueeze(1), (h, c))
        return torch.cat([self.out(h), h.detach(), c.detach()], dim=1)
