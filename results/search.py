"""Variants of FSG's slow term, trained as train_fsg.py trains. search.md has their results.

    python results/search.py leap+forget+residual --lr 1e-3     # then any flags of train_fsg.py

The first argument is one or several of these words, joined with +:

    fsg         nothing is changed: FSG with Mamba
    leap        D is divided by ε + r, with r = |W| / RMS(W) of the layer and ε = 0.35, as in gate.py
    forget      a flip of a weight clears its history, as in gate.py
    memory      SlowNet is replaced by Σ_k 0.8^k ĝ_{t−k} over the window; nothing is learned
    residual    SlowNet is that sum plus the slow-net's output, which starts at 0
    distance    the first token of each sequence is r − 1 in place of the layer's embedding
    smooth      φ is trained on an exponential average of the gradients (0.9) in place of the newest gradient
    aheadK      φ is trained on the mean of the K gradients after G, in place of the first
    frozen      φ is not trained

The variants have been compared with --balance layer-rms. With keep-mean, the default, memory and residual would lose a
part of their sum.

metrics.csv gets more columns. gradient/signal is ‖Σ g‖² / n for the n gradients g of φ since step 20, each scaled to
norm 1. It is about 1 if they are independent noise, and n if they are equal. gradient/lag0, lag1, … are coefficients:
the least-squares fit of the slow term by the newest gradient, the one before, …, over all weights. (History and slow
term are scaled to RMS 1 in each layer.)
"""

import re
import sys
from collections import deque
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runs
import train_fsg
from hypernet import FSG, SlowLSTM, signs

WORDS = ("fsg", "leap", "forget", "memory", "residual", "distance", "smooth", "frozen")


class Variant(FSG):
    """FSG with the changes that `words` name, see the module docstring."""

    def __init__(self, layers, words: set[str], **options):
        self.words = words
        self.ahead = max([int(w.removeprefix("ahead")) for w in words if w.startswith("ahead")], default=1)
        super().__init__(layers, **options)
        if "residual" in words:
            last = self.slow.out if isinstance(self.slow, SlowLSTM) else self.slow.out_proj
            torch.nn.init.zeros_(last.weight)
        if {"memory", "frozen"} & words:
            self.requires_grad_(False)
        self.register_buffer("average", torch.zeros_like(self.latent))
        self.register_buffer("distances", torch.zeros_like(self.latent))
        self.waiting = deque()  # what G of the last steps was made of, its sample, and the sum of the targets since
        self.summed, self.count = None, 0  # of φ's gradients
        self.register_buffer("decay", 0.8 ** torch.arange(self.length - 1, -1, -1.0).unsqueeze(1).to(self.latent))

    def collect(self):
        before = self.latent >= 0
        new = super().collect()
        if "forget" in self.words:
            self.history = self.history * (before == (self.latent >= 0))
        self.distances = self.latent.abs() / self.spread(self.rms(self.latent.unsqueeze(0)))
        return new

    def calibrate(self, pre: bool = True):
        D, W = super().calibrate(pre)
        return (D / (0.35 + self.distances) if "leap" in self.words else D), W

    def slow_output(self, seen, known=None):
        if not {"memory", "residual", "distance"} & self.words:
            return super().slow_output(seen, known)
        past = seen.history * signs(seen.ghat) / seen.history_rms.index_select(0, seen.layer_of)
        memory = (self.decay * past).sum(0)
        if "memory" in self.words:
            return memory
        if "distance" in self.words:
            at = slice(None) if self.sample is None or len(seen.ghat) == len(self.latent) else self.sample.at
            tokens = torch.cat([self.distances[at].unsqueeze(0) - 1, past])
            learned = self.slow.last(tokens.T.unsqueeze(-1))
        else:
            learned = super().slow_output(seen)
        return memory + learned if "residual" in self.words else learned

    def train_phi(self, v, wanted):
        if {"memory", "frozen"} & self.words:
            self.last_G = None
            return
        if "smooth" in self.words:
            self.average = 0.9 * self.average + v
            v = self.average / self.average.square().sum().sqrt()
        if self.ahead == 1:
            super().train_phi(v, wanted)
            return self.record()
        # φ has changed since the G of some steps ago was made, so its graph is built again with the present φ.
        self.last_G = None
        self.waiting.append([self.some, self.sample, torch.zeros_like(v)])
        for entry in self.waiting:
            entry[2] += v
        if len(self.waiting) == self.ahead:
            some, sample, total = self.waiting.popleft()
            self.sample = sample
            with torch.enable_grad():
                G = self.gradient(some._replace(slow=self.slow_output(some)))
            self.optimizer.zero_grad()
            G.backward(total if sample is None else total[sample.at] * sample.stands_for)
            self.optimizer.step()
            self.record()

    def record(self):
        """Sum φ's gradients, each of norm 1."""
        found = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
        if self.t > 20:
            self.summed = found / found.norm() + (0 if self.summed is None else self.summed)
            self.count += 1

    def measure(self, lr):
        signal = float("nan") if self.summed is None else (self.summed.square().sum() / self.count).item()
        return super().measure(lr) | {"signal": signal} | self.lags()

    @torch.no_grad()
    def lags(self):
        if self.t < 2:
            return {}
        seen = self.seen(*self.calibrate())
        past = (seen.history / self.spread(seen.history_rms)).double()
        slow = (self.slow_gradient(seen) / self.spread(seen.ghat_rms)).double()
        found = torch.linalg.pinv(past @ past.T) @ (past @ slow)
        return {f"lag{i}": x for i, x in enumerate(found.flip(0).tolist())}

    def gradient(self, seen):
        if torch.is_grad_enabled():
            self.some = seen._replace(slow=None)
        return super().gradient(seen)


def main(argv) -> int:
    words = set(argv[0].split("+")) if argv else set()
    unknown = [w for w in words if w not in WORDS and not re.fullmatch(r"ahead[1-9]\d*", w)]
    if unknown or not words:
        raise runs.RunError(f"{', '.join(unknown) or 'no word'}: see the words at the top of results/search.py")
    if any(word.startswith("--resume") for word in argv):
        raise runs.RunError("a run does not store its words, so it cannot be resumed: start it again without --resume")
    if any(word.startswith(("--grad", "--preset")) for word in argv):
        raise runs.RunError("the words change FSG: leave out --grad and --preset")
    train_fsg.FSG = lambda layers, **options: Variant(layers, words, **options)
    return train_fsg.main(["--grad", "fsg", *argv[1:]])


if __name__ == "__main__":
    runs.command(lambda: main(sys.argv[1:]))
