"""What a checkpoint holds for a run to go on exactly as if it had not stopped: weights, optimiser, random numbers, and the run.

Weights and the optimiser's state are kept whole and by parameter name, whatever number of processes they were spread over, and
are read without executing anything: safetensors, JSON, and ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

#: The trained parameters of a model whose other weights are not saved, as with PEFT's adapters.
TRAINED = "trained.safetensors"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
RUN = "run.json"


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of all random number generators of a process, as lists, numbers and tensors."""
    version, numbers, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": [version, list(numbers), gauss], "numpy": numpy, "cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set what :func:`random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def random_file(rank: int) -> str:
    """Return the name of the file with a process's random number generators."""
    return f"random-{rank}.pt"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor put together from all processes, which call this together, where it is spread over them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_name(name: str) -> str:
    """Return a parameter's name without what ``torch.compile`` and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def model_state(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """Return a model's ``state_dict``, whole and on the CPU; ``keep`` as in :func:`optimizer_state`."""
    owners = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    made: dict[int, Any] = {}  # tied weights stay one tensor
    state = {}
    for name, tensor in model.state_dict().items():
        owner = owners.get(name, id(tensor))
        if owner not in made:
            made[owner] = _kept(tensor, keep)
        state[plain_name(name)] = made[owner]
    return state


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Any]:
    """Return an optimiser's state by parameter name, whole and on the CPU.

    Where parameters are spread over processes all of them must call this together; without ``keep`` what is put together is
    not kept.
    """
    names = _names(model, optimizer)
    state = optimizer.state_dict()
    values = {names[index]: {key: _kept(part, keep) for key, part in parts.items()} for index, parts in state["state"].items()}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": values, "param_groups": groups}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Set what :func:`optimizer_state` returned.

    Raises:
        ValueError: the groups have other parameters than those it is the state of.
    """
    names = _names(model, optimizer)
    found = [group["params"] for group in state["param_groups"]]
    if [name for group in found for name in group] != names or len(found) != len(optimizer.param_groups):
        given = f"groups of {', '.join(str(len(group)) for group in found)} parameters"
        expected = f"those of this run, of {', '.join(str(len(group['params'])) for group in optimizer.param_groups)}"
        remedy = "Train the same parts at rates of their own as before, or begin a new run"
        raise ValueError(complaint("checkpoint", given, expected, remedy))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = {name: index for index, name in enumerate(names)}
    values = {
        indices[name]: {key: _spread(value, parameters[indices[name]]) for key, value in values.items()}
        for name, values in state["state"].items()
    }
    groups = [{**group, "params": [indices[name] for name in group["params"]]} for group in state["param_groups"]]
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def save_state(value: Any, file: Path) -> None:
    """Write what ``torch.load(weights_only=True)`` reads.

    Raises:
        OSError: a full disk, say, which torch itself tells as an unexpected position in a file.
    """
    with file.open("wb") as stream:
        try:
            torch.save(value, stream)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def save_model(model: Any, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a model as ``from_pretrained`` reads it; where that is only adapters, also all that is trained.

    Args:
        model: whose weights they are.
        folder: where to.
        weights: the model's ``state_dict``, whole.
    """
    options: dict[str, Any] = {"save_original_format": False}  # names as they are in the model
    if isinstance(model, PeftModel):
        options = {"save_embedding_layers": False}  # else PEFT may ask the hub about the base model
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        save_file({name: weights[name].contiguous() for name in sorted(trained)}, folder / TRAINED)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=weights, **options)
    finally:
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def load_weights(model: nn.Module, path: Path) -> None:
    """Copy a checkpoint's weights into a model, before it is spread over processes.

    Raises:
        ValueError: the model has other weights than those that were saved.
    """
    trained = path / TRAINED
    files = [trained] if trained.exists() else sorted(path.glob("model*.safetensors"))
    own: dict[str, torch.Tensor] = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    expected = {plain_name(name) for name, p in model.named_parameters() if p.requires_grad} if trained.exists() else set(own)
    loaded = set()
    for file in files:
        for name, tensor in load_file(file).items():
            if name not in own or own[name].shape != tensor.shape:
                shape = f" {list(own[name].shape)}" if name in own else ""
                given = f"{name} {list(tensor.shape)} in {path.name}"
                raise ValueError(
                    complaint("model", given, f"the model that was trained{shape}", "Build it as it was built then")
                )
            own[name].copy_(tensor)
            loaded.add(name)
    places = {own[name].data_ptr() for name in loaded}  # tied weights are saved once
    if missing := sorted(name for name in expected if own[name].data_ptr() not in places):
        given = f"no {missing[0]} in {path.name}"
        raise ValueError(complaint("model", given, "the model that was trained", "Build it as it was built then"))


def check_run(path: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of its run, where it is the same run: what is in ``run`` decides over the next steps.

    Raises:
        ValueError: it is another one, naming all that differs.
    """
    content: dict[str, Any] = json.loads((path / RUN).read_text(encoding="utf-8"))
    before, now = content["run"], json.loads(json.dumps(run))
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differing:
        given = "; ".join(f"{key} {now.get(key)}" for key in differing)
        expected = "; ".join(f"{key} {before.get(key)}" for key in differing) + f", as {path.name} was trained with"
        remedy = "Resume with what the run was begun with, or begin a new run in another folder"
        raise ValueError(complaint("resume_from_checkpoint", given, expected, remedy))
    return content


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of an optimiser's parameters, in its order."""
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _kept(value: Any, keep: bool) -> Any:
    if isinstance(value, torch.Tensor):
        value = whole(value).detach()
        return value.cpu() if keep else None
    return value


def _spread(value: Any, parameter: torch.Tensor) -> Any:
    if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
