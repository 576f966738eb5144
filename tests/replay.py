"""Replay a file of golden numbers through the public classes, and print the worst relative errors.

    python tests/replay.py FILE.npz ...

Prints one line of JSON per file and exits with 1 where an error is above 1e-10. `fsg_released.npz`,
`fsg_released_lstm.npz` and `metaquant.npz` hold the authors' training steps and are replayed here in float64;
tests/replay_networks.py replays `sibnn.npz`, `equalbits.npz` and `irnet.npz`. What is replayed follows from the arrays
in the file, and so do all widths, rates and numbers of steps.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import models
from fsg_released import ReleasedFSG, ReleasedFSGLSTM
from metaquant import AuthorsAdam, ReleasedFCGrad, ReleasedLSTMFC, ReleasedMultiFC

BOUND = 1e-10
METAQUANT = {"fcgrad": ReleasedFCGrad, "multifc": ReleasedMultiFC, "lstmfc": ReleasedLSTMFC}
# Names of φ in the file and in the class, where they differ.
RENAMED = {"slow.lstm.": "cell.", "slow.out.": "out."}


class Errors(dict):
    """The worst error of each kind."""

    def add(self, kind: str, found, stored, scale) -> None:
        """max|found − stored| / scale; 0 where they are equal, also if scale is 0."""
        found = found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
        assert found.shape == stored.shape, f"{kind}: {found.shape} against {stored.shape}"
        worst = float(np.abs(found - stored).max(initial=0.0))
        if not np.isfinite(found).all():
            worst = np.inf
        worst = worst and worst / max(float(scale), 1e-300)
        self[kind] = max(self.get(kind, 0.0), worst)


def moved(stored: np.ndarray, start: np.ndarray) -> float:
    return np.abs(stored - start).max(initial=0.0)


def largest(stored: np.ndarray) -> float:
    return np.abs(stored).max(initial=0.0)


def under(npz, prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): npz[name] for name in npz.files if name.startswith(prefix)}


def network(npz, quantizer: str) -> torch.nn.Module:
    """The file's network at its start. The classifier's BatchNorm is there if the file has it."""
    start = {name: torch.from_numpy(value) for name, value in under(npz, "init/model.").items()}
    classes, channels = len(start["fc.weight"]), start["conv1.weight"].shape[1]
    blocks, widths = npz["hyper/blocks"].tolist(), npz["hyper/widths"].tolist()
    design = models.resnet_design("resnet20" if "bn_fc.weight" in start else "resnet20-metaquant", "none", "cifar")
    net = models.ResNet(blocks, widths, classes, channels, stem="cifar", **design)
    models.binarize_(net.double(), quantizer, first=True, last=True)
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum, module.eps = float(npz["hyper/bn_momentum"]), float(npz["hyper/bn_eps"])
    net.load_state_dict(start)
    return net


def load_phi(generator, start: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Give φ the values of the file: φ's parameters, by the names in the file."""
    own, phi = dict(generator.named_parameters()), {}
    for name, value in start.items():
        ours = name
        for theirs, new in RENAMED.items():
            if name not in own and name.startswith(theirs):
                ours = new + name.removeprefix(theirs).removesuffix("_l0")
        phi[name] = own[ours]
        phi[name].data.copy_(torch.from_numpy(value))
    assert len(phi) == len(own), f"the file has {sorted(start)}, φ has {sorted(own)}"
    return phi


def optimizer_of(npz, name: str, net, weight_decay: float):
    if name == "sgd":
        momentum = float(npz["hyper/momentum"])
        return torch.optim.SGD(net.parameters(), float(npz["hyper/lr"]), momentum=momentum, weight_decay=weight_decay)
    betas, eps = npz["hyper/adam_betas"].tolist(), float(npz["hyper/adam_eps_weights"])
    return AuthorsAdam(net.parameters(), float(npz["hyper/lr"]), betas, eps, weight_decay)


def replay_run(npz, prefix: str, net, generator, optimizer, phi, phi_start: dict, errors: Errors) -> None:
    """Train as the public training loop does, and compare with the arrays below `prefix`."""
    lr, names = float(npz["hyper/lr"]), models.binary_layer_names(net)
    order = [names.index(name) for name in npz["layers"].tolist()]
    layers = [models.binary_layers(net)[i] for i in order]
    start, losses = under(npz, "init/model."), npz[f"{prefix}loss"]
    flat = lambda tensors: torch.cat([t.detach().flatten() for t in tensors])
    latent = {f"{name}.weight" for name in names}
    net.train()
    found = []
    for step, (x, y) in enumerate(zip(npz["batches/inputs"], npz["batches/labels"], strict=True), 1):
        stored = under(npz, f"{prefix}step{step}/")
        detail = lambda name, value, stored=stored: (
            name in stored and errors.add("detail", value, stored[name], largest(stored[name]))
        )
        if "flat_D" in stored:
            persistent = flat(layer.weight for layer in layers)
        generator.look_ahead(lr)
        detail("flat_look_ahead", flat(layer.weight for layer in layers))
        if getattr(net.fc, "bias", None) is not None:
            detail("fc_bias_look_ahead", net.fc.bias)
        optimizer.zero_grad()
        logits = net(torch.from_numpy(x).double())
        detail("logits", logits)
        loss = F.cross_entropy(logits, torch.from_numpy(y))
        loss.backward()
        detail("flat_ghat", flat(layer.weight.grad for layer in layers))
        found.append(loss.item())
        generator.generate()
        if "flat_D" in stored and "flat_fast" in stored:  # the update is D ⊙ fast
            G = flat(layer.weight.grad for layer in layers).numpy()
            expected = stored["flat_D"] * stored["flat_fast"]
            errors.add("detail", G, expected, largest(expected))
            ahead = (1 - float(npz["hyper/beta"])) * expected + float(npz["hyper/beta"]) * stored["flat_slow"]
            ahead = persistent.numpy() - lr * ahead
            errors.add("detail", ahead, stored["flat_look_ahead"], largest(stored["flat_look_ahead"]))
        if "flat_meta_gradient" in stored and names and layers[0].quantizer != "dorefa":  # D is 1
            detail("flat_meta_gradient", flat(layer.weight.grad for layer in layers))
        for name, p in phi.items():
            if f"grad.{name}" in stored:
                detail(f"grad.{name}", p.grad)
        if generator.t > 1:
            optimizer.step()
        for name, value in net.state_dict().items():
            if f"model.{name}" in stored:
                kind = "W" if name in latent else "other"
                errors.add(kind, value, stored[f"model.{name}"], moved(stored[f"model.{name}"], start[name]))
        for name, p in phi.items():
            if name in stored:
                errors.add("phi", p, stored[name], moved(stored[name], phi_start[name]))
    errors.add("loss", np.array(found), losses, moved(losses, losses[0]) or largest(losses))


def replay_fsg(npz) -> Errors:
    """The file of FSG's released steps, with Mamba or with the LSTM, under each optimizer in the file."""
    errors = Errors()
    start = {name: a for name, a in under(npz, "init/").items() if not name.startswith("model.")}
    options = {"beta": float(npz["hyper/beta"]), "hidden": int(npz["hyper/fast_hidden"])}
    options |= {"lr_fast": float(npz["hyper/lr_phi_fast"]), "lr_slow": float(npz["hyper/lr_phi_slow"])}
    for name in sorted({name.split("/")[0] for name in npz.files if name.endswith("/loss")}):
        net = network(npz, str(npz["hyper/quantizer"]))
        layers = layers_in_order(npz, net)
        if "slow.A_log" in start:
            mamba = {key: int(npz[f"hyper/{key}"]) for key in ("expand", "d_state", "d_conv", "length")}
            generator = ReleasedFSG(layers, **options, **mamba)
        else:
            generator = ReleasedFSGLSTM(layers, **options, lstm_hidden=int(npz["hyper/lstm_hidden"]))
        phi = load_phi(generator, start)
        optimizer = optimizer_of(npz, name, net, float(npz["hyper/weight_decay"]))
        set_adam(npz, generator)
        replay_run(npz, f"{name}/", net, generator, optimizer, phi, start, errors)
    return errors


def replay_metaquant(npz) -> Errors:
    """The file of MetaQuant's released steps: every method, quantizer and optimizer in the file."""
    errors = Errors()
    for run in sorted({name.removesuffix("/loss") for name in npz.files if name.endswith("/loss")}):
        method, quantizer, name = run.split("/")
        start = under(npz, f"init/{method}/")
        net = network(npz, {"bwn": "bwn-l"}.get(quantizer, quantizer))
        layers = layers_in_order(npz, net)
        hidden = int(npz[f"hyper/hidden_{method}"])
        generator = METAQUANT[method](layers, hidden, lr=float(npz["hyper/lr_phi"]))
        phi = load_phi(generator, start)
        optimizer = optimizer_of(npz, name, net, float(npz[f"hyper/weight_decay_{name}"]))
        set_adam(npz, generator)
        replay_run(npz, f"{run}/", net, generator, optimizer, phi, start, errors)
    return errors


def layers_in_order(npz, net) -> list[torch.nn.Module]:
    """The binary layers in the order in which the file lists them: row i of the layer embedding is layer i's."""
    modules = dict(net.named_modules())
    return [modules[name] for name in npz["layers"].tolist()]


def set_adam(npz, generator) -> None:
    """φ's Adam has the file's constants."""
    for group in generator.optimizer.param_groups:
        group["betas"], group["eps"] = tuple(npz["hyper/adam_betas"].tolist()), float(npz["hyper/adam_eps_phi"])


def replay(path: str) -> dict[str, float]:
    """The worst relative errors of the file, by kind: "W", "phi", "loss", ... for training steps."""
    npz = np.load(path, allow_pickle=False)
    names = set(npz.files)
    if "init/fast.linears.0.weight" in names:
        return replay_fsg(npz)
    if "methods" in names or any(name.startswith(("init/fcgrad/", "init/multifc/", "init/lstmfc/")) for name in names):
        return replay_metaquant(npz)
    import replay_networks

    source = str(npz["source"]) if "source" in names else ""
    for word, function in (
        ("SiBNN", replay_networks.replay_sibnn),
        ("Equal-Bits", replay_networks.replay_equalbits),
        ("IR-Net", replay_networks.replay_irnet),
    ):
        if word in source:
            return function(npz)
    raise SystemExit(f"{path} is none of the known kinds of golden files (source: {source or 'missing'})")


def main(paths: list[str]) -> int:
    torch.set_num_threads(1)
    worst = 0.0
    for path in paths:
        errors = replay(path)
        print(json.dumps(errors, sort_keys=True))
        worst = max(worst, *errors.values())
    return int(not worst <= BOUND)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    sys.exit(main(sys.argv[1:]))
