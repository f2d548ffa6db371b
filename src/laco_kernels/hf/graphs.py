"""An encoder's forward pass as CUDA graphs: one launch instead of hundreds, for every input shape that comes along."""

from __future__ import annotations

import functools
import inspect
import operator
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import overrides
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_flatten, tree_unflatten

from laco_kernels.errors import complaint
from laco_kernels.hf.fusing import is_called_for_others, is_transformed, launches_are_free

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

PATIENCE = 100  # calls after which a graph that was not used makes room for others
WARMUPS = 3  # calls before a capture, in which libraries choose and allocate what they need
CONFIGURED = ("output_hidden_states", "output_attentions", "return_dict", "_attn_implementation")
SIMPLE = (bool, int, float, str, type(None))


@functools.cache
def capturing_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that all captures on ``device`` share: cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream(device)


@dataclass
class Captured:
    """A graph with the tensors it reads and writes; where there could be none, ``graph`` is ``None``."""

    graph: torch.cuda.CUDAGraph | None = None
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)  # leaves: tensors, and what else the model returns
    spec: Any = None
    nbytes: int = 0
    used: int = 0  # the call in which it was used last


def is_seen() -> bool:
    """Return whether a transform, a trace or a mode looks at what runs, which it would not find in a replay."""
    if is_transformed() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return True
    # torch.set_default_device is a mode, too, but concerns only what is made anew.
    return any(type(mode) is not DeviceContext for mode in overrides._get_current_function_mode_stack())


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether parameters are spread over processes; by name, for importing the class takes its time."""
    return any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())


class Anatomy:
    """The modules and parameters of a model at one time, and how to see cheaply that they are still the same."""

    def __init__(self, model: torch.nn.Module) -> None:
        if is_sharded(model):
            remedy = "Optimise it with graphs=False"
            raise RuntimeError(complaint("graphs", "sharded parameters", "parameters that stay where they are", remedy))
        modules = list(model.modules())
        self.inner = modules[1:]
        # What adapters do depends on attributes that nothing here sees: which are active, merged, scaled how.
        self.is_adapted = any(type(module).__module__.partition(".")[0] == "peft" for module in modules)
        slots = [(table, name) for m in modules for table in (m._modules, m._parameters, m._buffers) for name in table]
        self.slots = slots
        self.contents = [table[name] for table, name in slots]
        self.tensors = [content for content in self.contents if isinstance(content, torch.Tensor)]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]

    def has_moved(self) -> bool:
        """Return whether a tensor has other memory now; they are kept alive, so that the old one may be read until then."""
        return [tensor.data_ptr() for tensor in self.tensors] != self.addresses

    def has_changed(self) -> bool:
        """Return whether a module or tensor was replaced."""
        return not all(map(operator.is_, [table.get(name) for table, name in self.slots], self.contents))

    def is_watched(self) -> bool:
        """Return whether somebody's hooks wait for modules inside, which a replay would pass over, or one of them trains."""
        if torch.nn.modules.module._has_any_global_hook():
            return True
        return any(module.training or is_called_for_others(module) for module in self.inner)


class GraphedForward:
    """The forward pass of ``encoder``, replayed where nothing forbids it.

    In evaluation mode and without gradients only; else, and with hooks on modules or PEFT's adapters inside, the encoder runs
    as it is. A shape is captured when it comes for the first time; what is set on a module afterwards, and is no tensor, a
    graph does not see. Where graphs would hold more memory than ``max_bytes``, those that were not used for :data:`PATIENCE`
    calls are dropped, and a shape that does not fit beside the others runs without.

    Args:
        encoder: the model.
        forward: its forward pass, as it runs outside graphs.
        max_bytes: bound on the memory that graphs hold: inputs, outputs and everything in between. What is in between they
            share, so that what a dropped graph has held serves the next ones.
        batch_sizes: batches are padded to the next larger of these, so that few graphs serve all; none pads nothing.
        clone: return copies of what a graph writes; else a result is valid until the next call.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        forward: Callable[..., Any],
        *,
        max_bytes: int,
        batch_sizes: Sequence[int] = (),
        clone: bool = True,
    ) -> None:
        self.encoder = encoder
        self.forward = forward
        self.max_bytes = max_bytes
        self.batch_sizes = sorted(batch_sizes)
        self.clone = clone
        self._start()

    def _start(self) -> None:
        self.graphs: OrderedDict[Any, Captured] = OrderedDict()
        self.anatomy: Anatomy | None = None
        self.__signature__ = inspect.signature(self.forward)  # by which the Trainer picks its columns
        self.pool: Any = None
        self.finished: torch.cuda.Event | None = None
        self.lock = threading.Lock()
        self.calls = 0
        self.crowded: dict[Any, int] = {}  # bytes that a shape would hold for which there was no room

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the graphs, which read the memory of the original."""
        kept = ("encoder", "forward", "max_bytes", "batch_sizes", "clone")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo :meth:`__getstate__`."""
        self.__dict__.update(state)
        self._start()

    def release(self) -> None:
        """Drop all graphs and the memory they hold."""
        if self.graphs:
            torch.cuda.synchronize()  # one may be running
        self.graphs.clear()
        self.crowded.clear()
        self.anatomy = self.pool = self.finished = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the encoder; arguments and outputs are its own."""
        values = [*args, *kwargs.values()]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if self._allows(values, tensors):
            with self.lock:
                replayed = self._replay(args, kwargs, values, tensors)
            if replayed is not None:
                return replayed
        return self.forward(*args, **kwargs)

    def _allows(self, values: list[Any], tensors: list[torch.Tensor]) -> bool:
        return (
            bool(tensors)
            and all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
            and all(tensor.is_cuda and tensor.dim() and len(tensor) == len(tensors[0]) for tensor in tensors)
            and all(isinstance(value, (torch.Tensor, *SIMPLE)) for value in values)
            and not self.encoder.training
            and not torch.compiler.is_compiling()
            and not is_seen()
            and not torch.cuda.is_current_stream_capturing()
            and not (torch.is_grad_enabled() and self._wants_gradients(tensors))
        )

    def _wants_gradients(self, tensors: list[torch.Tensor]) -> bool:
        return any(t.requires_grad for t in tensors) or any(p.requires_grad for p in self.encoder.parameters())

    def _replay(self, args: Any, kwargs: Any, values: list[Any], tensors: list[torch.Tensor]) -> Any:
        """Return the outputs, or ``None`` where this call cannot be replayed."""
        if self.anatomy is None or self.anatomy.has_moved():
            self.release()
            self.anatomy = Anatomy(self.encoder)
        if self.anatomy.is_adapted:
            return None
        device, batch = tensors[0].device, tensors[0].shape[0]
        padded = next((size for size in self.batch_sizes if size >= batch), batch)
        key = (
            padded,
            *[
                value if not isinstance(value, torch.Tensor) else (value.shape[1:], value.dtype, value.device)
                for value in values
            ],
            len(args),
            *kwargs,
            *[getattr(self.encoder.config, name, None) for name in CONFIGURED],
            torch.is_inference_mode_enabled(),
            torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
        )
        stream = torch.cuda.current_stream(device)
        if self.finished is not None:
            stream.wait_event(self.finished)  # the buffers may be in use on another stream
        self.calls += 1
        if key not in self.graphs:
            if self.anatomy.is_watched() or not self._may_have_room(key):
                return None
            captured = self._capture(args, kwargs, tensors, padded)
            if not self._make_room(captured.nbytes):
                self.crowded[key] = captured.nbytes
                self.pool = self.pool if self.graphs else None
                return None
            self.graphs[key] = captured
        self.graphs.move_to_end(key)
        captured = self.graphs[key]
        captured.used = self.calls
        if captured.graph is None:
            return None
        for buffer, tensor in zip(captured.inputs, tensors, strict=True):
            buffer[: tensor.shape[0]].copy_(tensor)
        captured.graph.replay()
        # While the graph runs there is time to see whether it should have.
        if self.anatomy.has_changed() or self.anatomy.is_watched():
            self.release()
            return None
        outputs = [self._result(leaf, batch, padded) for leaf in captured.outputs]
        self.finished = torch.cuda.Event()
        self.finished.record(stream)
        return tree_unflatten(outputs, captured.spec)

    def _result(self, leaf: Any, batch: int, padded: int) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf[:batch] if batch != padded and leaf.shape[:1] == (padded,) else leaf
        return leaf.clone() if self.clone else leaf

    def _capture(self, args: Any, kwargs: Any, tensors: list[torch.Tensor], padded: int) -> Captured:
        """Capture a graph for tensors of these shapes, ``padded`` rows each; say so where that is impossible."""
        device = tensors[0].device
        inputs = [torch.zeros(padded, *tensor.shape[1:], dtype=tensor.dtype, device=device) for tensor in tensors]
        for buffer, tensor in zip(inputs, tensors, strict=True):
            buffer[: tensor.shape[0]].copy_(tensor)
        buffers = iter(inputs)
        args = [next(buffers) if isinstance(value, torch.Tensor) else value for value in args]
        kwargs = {name: next(buffers) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        side = capturing_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        # What autocast keeps of the weights would lie in a graph's memory, where others would read it.
        autocast = torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False)
        with torch.cuda.device(device), autocast, launches_are_free():
            with torch.cuda.stream(side):
                for _ in range(WARMUPS):
                    self.forward(*args, **kwargs)
            side.synchronize()
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            before, graph = torch.cuda.memory_reserved(device), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=side):
                    outputs, spec = tree_flatten(self.forward(*args, **kwargs))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                torch.cuda.synchronize(device)
                reason = str(error).partition("\n")[0]
                warnings.warn(f"laco_kernels: this encoder cannot be captured as a CUDA graph ({reason})", stacklevel=6)
                return Captured()
        torch.cuda.current_stream(device).wait_stream(side)
        held = sum(buffer.nbytes for buffer in inputs) + max(torch.cuda.memory_reserved(device) - before, 0)
        return Captured(graph, inputs, outputs, spec, held)

    def _may_have_room(self, key: Any) -> bool:
        """Return whether to capture a shape: there was room for it always, or there is now."""
        if key not in self.crowded:
            return True
        held = sum(captured.nbytes for captured in self.graphs.values() if not self._is_idle(captured))
        return held + self.crowded[key] <= self.max_bytes

    def _make_room(self, nbytes: int) -> bool:
        """Drop idle graphs, the oldest first, until there is room for as many bytes; return whether there is."""
        held = nbytes + sum(captured.nbytes for captured in self.graphs.values())
        idle = [key for key, captured in self.graphs.items() if self._is_idle(captured)]
        if held - sum(self.graphs[key].nbytes for key in idle) > self.max_bytes:
            if not self.crowded:
                given = f"no room for {nbytes:,} bytes more among max_bytes={self.max_bytes:,}"
                warnings.warn(f"laco_kernels: {given}, so some shapes run without a CUDA graph", stacklevel=6)
            return False
        for key in idle:
            if held <= self.max_bytes:
                break
            torch.cuda.synchronize()
            held -= self.graphs.pop(key).nbytes
        return True

    def _is_idle(self, captured: Captured) -> bool:
        return self.calls - captured.used > PATIENCE
