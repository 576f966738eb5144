"""Replay a file of golden numbers through the public classes, and print the worst relative errors.

    python tests/replay.py FILE.npz ...

Prints one line of JSON per file: the largest error of each kind. Exits with 1 where one is above 1e-10.

`fsg_released.npz`, `fsg_released_lstm.npz` and `metaquant.npz` hold training steps of the authors' codes, which are
repeated here in float64. The kinds are "W" (latent weights), "other" (the network's other parameters and buffers),
"phi", "loss" and "detail" (what is stored from within a step). An error of the first four is relative to how far the
stored tensor has moved since the start, an error of a detail to the tensor's largest element.
tests/replay_networks.py replays `sibnn.npz`, `equalbits.npz` and `irnet.npz`.
What is replayed follows from the arrays in the file, and so do all sizes, rates and numbers of steps.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from fsg_released import ReleasedFSG, ReleasedFSGLSTM
from metaquant import AuthorsAdam, ReleasedFCGrad, ReleasedLSTMFC, ReleasedMultiFC

BOUND = 1e-10
METAQUANT = {"fcgrad": ReleasedFCGrad, "multifc": ReleasedMultiFC, "lstmfc": ReleasedLSTMFC}


class Errors(dict):
    """The largest error of each kind."""

    def add(self, kind: str, ours, stored: np.ndarray, scale: float) -> None:
        """max|ours − stored| / scale; infinity for another shape and for NaN."""
        ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
        error = np.abs(ours - stored).max(initial=0.0) if ours.shape == stored.shape else np.inf
        error = np.inf if np.isnan(error) else error
        relative = float(error / max(scale, 1e-300)) if error else 0.0
        self[kind] = max(self.get(kind, 0.0), relative)

    def moved(self, kind: str, ours, stored: np.ndarray, start: np.ndarray) -> None:
        self.add(kind, ours, stored, np.abs(stored - start).max(initial=0.0))

    def detail(self, ours, stored: np.ndarray) -> None:
        self.add("detail", ours, stored, np.abs(stored).max(initial=0.0))


def under(npz, prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): npz[name] for name in npz.files if name.startswith(prefix)}


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


# ---------------------------------------------------------------------------------------------------------------------
# What a file describes.


def network(npz, quantizer: str) -> torch.nn.Module:
    """The network at the start, in float64. It has a BatchNorm1d before the classifier if the file has one."""
    start = {name: torch.from_numpy(value) for name, value in under(npz, "init/model.").items()}
    classes, channels = len(start["fc.weight"]), start["conv1.weight"].shape[1]
    blocks, widths = npz["hyper/blocks"].tolist(), npz["hyper/widths"].tolist()
    design = models.resnet_design("resnet20" if "bn_fc.weight" in start else "resnet20-metaquant", "none", "cifar")
    net = models.ResNet(blocks, widths, classes, channels, stem="cifar", **design).double()
    models.binarize_(net, quantizer, first=True, last=True)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.momentum, module.eps = float(npz["hyper/bn_momentum"]), float(npz["hyper/bn_eps"])
    net.load_state_dict(start)
    return net


def optimizer_of(npz, name: str, net: torch.nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    lr = float(npz["hyper/lr"])
    if name == "sgd":
        return torch.optim.SGD(net.parameters(), lr, momentum=float(npz["hyper/momentum"]), weight_decay=weight_decay)
    betas, eps = npz["hyper/adam_betas"].tolist(), float(npz["hyper/adam_eps_weights"])
    return AuthorsAdam(net.parameters(), lr, betas, eps, weight_decay)


def load_phi(npz, generator, start: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Give φ and its Adam the file's values. Returns φ's parameters by their names in the file."""
    own, phi = dict(generator.named_parameters()), {}
    for name, value in start.items():
        ours = name if name in own else name.replace("slow.lstm.", "cell.").replace("slow.out.", "out.")
        phi[name] = own[ours.removesuffix("_l0")]
        phi[name].data.copy_(torch.from_numpy(value))
    if len(phi) != len(own):
        raise SystemExit(f"the file gives {', '.join(phi)} of the parameters {', '.join(own)}")
    for group in generator.optimizer.param_groups:
        group["betas"], group["eps"] = tuple(npz["hyper/adam_betas"].tolist()), float(npz["hyper/adam_eps_phi"])
    return phi


# ---------------------------------------------------------------------------------------------------------------------
# The replays.


def replay_steps(npz, prefix, net, layers, generator, optimizer, phi, phi_start, errors) -> None:
    """Train on the file's batches as train_fsg.py does, and compare with the arrays below `prefix`."""
    lr, start, losses = float(npz["hyper/lr"]), under(npz, "init/model."), npz[f"{prefix}loss"]
    latent = {f"{name}.weight" for name in npz["layers"].tolist()}
    weights, bias = [layer.weight for layer in layers], net.fc.bias
    net.train()
    found = []
    for step, (x, y) in enumerate(zip(npz["batches/inputs"], npz["batches/labels"], strict=True), 1):
        stored, inside = under(npz, f"{prefix}step{step}/"), {}
        generator.look_ahead(lr)
        inside |= {"flat_look_ahead": flat(weights), "fc_bias_look_ahead": bias.detach().clone()}
        optimizer.zero_grad()
        inside["logits"] = logits = net(torch.from_numpy(x).double())
        loss = F.cross_entropy(logits, torch.from_numpy(y))
        loss.backward()
        inside["flat_ghat"] = flat(w.grad for w in weights)
        found.append(loss.item())
        generator.generate()
        G = flat(w.grad for w in weights)
        inside |= {f"grad.{name}": p.grad for name, p in phi.items()}
        for name in inside.keys() & stored.keys():
            errors.detail(inside[name], stored[name])
        if "flat_fast" in stored:
            errors.detail(G, stored["flat_D"] * stored["flat_fast"])
        if "flat_meta_gradient" in stored and generator.kind != "dorefa":  # D is 1
            errors.detail(G, stored["flat_meta_gradient"])

        if generator.t > 1:
            optimizer.step()
        for name, value in net.state_dict().items():
            if f"model.{name}" in stored:
                errors.moved("W" if name in latent else "other", value, stored[f"model.{name}"], start[name])
        for name, p in phi.items():
            if name in stored:
                errors.moved("phi", p, stored[name], phi_start[name])
    errors.moved("loss", np.array(found), losses, losses[0])


def replay_fsg(npz) -> Errors:
    """FSG with Mamba or with the LSTM, under each optimizer of the file."""
    errors = Errors()
    start = {name: value for name, value in under(npz, "init/").items() if not name.startswith("model.")}
    options = {"beta": float(npz["hyper/beta"]), "hidden": int(npz["hyper/fast_hidden"])}
    options |= {"lr_fast": float(npz["hyper/lr_phi_fast"]), "lr_slow": float(npz["hyper/lr_phi_slow"])}
    mamba = "slow.A_log" in start
    for name in ("length", "expand", "d_state", "d_conv") if mamba else ("lstm_hidden",):
        options[name] = int(npz[f"hyper/{name}"])
    for name in sorted(name.removesuffix("/loss") for name in npz.files if name.endswith("/loss")):
        net = network(npz, str(npz["hyper/quantizer"]))
        layers = [net.get_submodule(layer) for layer in npz["layers"].tolist()]
        generator = (ReleasedFSG if mamba else ReleasedFSGLSTM)(layers, **options)
        phi = load_phi(npz, generator, start)
        optimizer = optimizer_of(npz, name, net, float(npz["hyper/weight_decay"]))
        replay_steps(npz, f"{name}/", net, layers, generator, optimizer, phi, start, errors)
    return errors


def replay_metaquant(npz) -> Errors:
    """Each method with each quantizer and optimizer of the file."""
    errors = Errors()
    for run in sorted(name.removesuffix("/loss") for name in npz.files if name.endswith("/loss")):
        method, quantizer, name = run.split("/")
        start = under(npz, f"init/{method}/")
        net = network(npz, {"bwn": "bwn-l"}.get(quantizer, quantizer))
        layers = [net.get_submodule(layer) for layer in npz["layers"].tolist()]
        generator = METAQUANT[method](layers, int(npz[f"hyper/hidden_{method}"]), lr=float(npz["hyper/lr_phi"]))
        phi = load_phi(npz, generator, start)
        optimizer = optimizer_of(npz, name, net, float(npz[f"hyper/weight_decay_{name}"]))
        replay_steps(npz, f"{run}/", net, layers, generator, optimizer, phi, start, errors)
    return errors


def replay(path: str | Path) -> dict[str, float]:
    """The worst relative error of each kind. Raises SystemExit with a sentence for a file of another kind."""
    try:
        npz = np.load(path, allow_pickle=False)
        names = npz.files
    except (OSError, ValueError, AttributeError) as e:
        raise SystemExit(f"{path} is not an .npz file: {e}") from None
    if any(name.startswith("init/fast.") for name in names):
        return replay_fsg(npz)
    if "methods" in names:
        return replay_metaquant(npz)
    import replay_networks

    functions = {"block_plain/init/": replay_networks.replay_equalbits, "eval/1w1a/": replay_networks.replay_irnet}
    functions = {"clamped_weight/": replay_networks.replay_sibnn} | functions
    for part, function in functions.items():
        if any(part in name for name in names):
            return function(npz)
    raise SystemExit(f"{path} holds no training steps, blocks or networks that this script knows")


def main(paths: list[str]) -> int:
    torch.set_num_threads(1)
    worst = 0.0
    for path in paths:
        errors = {name: float(error) for name, error in replay(path).items()}
        print(json.dumps(errors, sort_keys=True), flush=True)
        worst = max([worst, *errors.values()])
    return int(worst > BOUND)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    sys.exit(main(sys.argv[1:]))
