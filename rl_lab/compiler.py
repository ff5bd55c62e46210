"""Pure functions of tensors, compiled ahead of time and cached on disk, or on a GPU captured; and the loop within them.

On a CPU `Compiled(function, key)` traces `function` to one graph at its first call, compiles that with AOTInductor and
keeps the shared library in the cache folder, so that the next process loads it in milliseconds instead of tracing and
compiling for half a minute. The price is that a graph is exact for shapes, dtypes and everything `function` closes
over: shapes and dtypes are read off the arguments, the rest must be named in `key`.

On a CUDA device nothing is compiled: the function's own kernels are captured as a CUDA graph at its first call, its
loops unrolled, and each call is then one launch, whatever their number, and waits for nothing.

The cache folder is `$RL_LAB_CACHE`, else `~/.cache/rl_lab`; its libraries are code, as every compiler's cache is:
keep it as private as the checkout.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vmap

Function = Callable[..., Any]


def scan(step: Function, carry: Any, xs: Any, constants: tuple[Any, ...] = ()) -> tuple[Any, Any]:
    """Loop over the first axis of `xs`: `carry, y = step(carry, x, *constants)`.

    One loop inside the graph where a compiler traces it, a Python loop elsewhere; both are the same mathematics.

    Args:
        step: pure; returns a carry of the same structure, shapes and dtypes, and any tree of tensors.
        carry: tree of tensors.
        xs: tree of tensors with equal first axis T >= 1.
        constants: trees of tensors. A loop within a loop must be given all that its `step` uses, and so must the outer
            one; else `step` may close over them.
    Returns:
        the last carry, and the tree of ys stacked along a new first axis T.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:
        from torch._higher_order_ops.scan import scan as traced_scan

        if constants:
            return _nested_scan(step, carry, xs, constants)
        return traced_scan(lambda c, x: _unaliased(*step(c, x)), carry, xs)
    ys = []
    for t in range(pytree.tree_leaves(xs)[0].shape[0]):
        carry, y = step(carry, pytree.tree_map(lambda x, t=t: x[t], xs), *constants)
        ys.append(y)
    return carry, pytree.tree_map(lambda *y: torch.stack(y), *ys)


def _nested_scan(step: Function, carry: Any, xs: Any, constants: tuple[Any, ...]) -> tuple[Any, Any]:
    """As torch's `scan`, without Dynamo, which finds what a body closes over but fails at a loop inside a gradient."""
    from torch._higher_order_ops.scan import scan_op

    leaves, treespecs = zip(*map(pytree.tree_flatten, (carry, xs, constants)), strict=True)
    sizes, outspec = list(map(len, leaves)), list[pytree.TreeSpec]()

    def flat(*args: Tensor) -> list[Tensor]:
        ends = list(itertools.accumulate(sizes))
        parts = [args[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        c, x, rest = (pytree.tree_unflatten(part, spec) for part, spec in zip(parts, treespecs, strict=True))
        new, y = step(c, x, *rest)
        outspec[:] = [pytree.tree_structure(y)]
        return [_dense(x) for x in pytree.tree_leaves((new, y))]

    outputs = scan_op(flat, *leaves)
    carry, ys = outputs[: sizes[0]], outputs[sizes[0] :]
    return pytree.tree_unflatten(carry, treespecs[0]), pytree.tree_unflatten(ys, outspec[0])


def _unaliased(carry: Any, y: Any) -> tuple[Any, Any]:
    """Clone outputs: a traced loop body may not return its inputs, nor one tensor twice."""
    return pytree.tree_map(torch.clone, carry), pytree.tree_map(torch.clone, y)


_NEVER_TRACED = {"__init__", "__main__", "checkpoint", "cli", "compare", "evaluate", "log", "run"}


class NoCompiler(RuntimeError):
    """There is no C++ compiler; the message says what would work."""


class Compiled:
    """A pure function, compiled at its first call for arguments like those, or loaded from the cache.

    Args:
        function: of trees of tensors; returns a tree of tensors. Called without gradients.
        key: everything the graph depends on besides shapes and dtypes; its `repr` enters the cache's key, together
            with the core's sources, the versions and the processor.
        enabled: False calls `function` eagerly, for debugging.
        donate: numbers of the arguments whose memory is given to the first results, in this order: a call overwrites
            them with these results and returns the very same tensors. Large arrays would otherwise be allocated anew
            at each call, which costs more than Adam's arithmetic. Such a result must be computed: it may be the
            argument itself, but not another one.
        in_place: numbers of the arguments that are the very same tensors at every call. A captured graph reads them
            where they are, and copies of all others: of a replay's columns these would be a second replay.
    Raises:
        NoCompiler: at the first call.
    """

    def __init__(
        self,
        function: Function,
        key: object,
        enabled: bool = True,
        donate: Sequence[int] = (),
        in_place: Sequence[int] = (),
    ) -> None:
        self.function, self.key, self.enabled, self.donate, self.in_place = function, key, enabled, donate, in_place
        self._graph: tuple[Callable[[list[Tensor]], list[Tensor]], Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """Trees in, a tree of new tensors out. Shapes, dtypes and devices must be those of the first call."""
        if self.enabled:
            leaves = leaves_of(args)
            run, shape = self._graph or self._build(leaves, pytree.tree_structure(args))
            results = _unflatten(shape, run(leaves))
        else:
            results = self._eagerly(args)
        return (*(args[i] for i in self.donate), *results) if self.donate else results

    def _eagerly(self, args: Sequence[Any]) -> Any:
        """The results without those that were donated memory."""
        with torch.no_grad():  # dense memory of their own, as the compiled graph's; kernels round by alignment
            results = pytree.tree_map(_dense, self.function(*args))
            if self.donate:
                _donate(tuple(args[i] for i in self.donate), results)
        return results[len(self.donate) :] if self.donate else results

    def on_leaves(self, *args: Any) -> Callable[[list[Tensor]], list[Tensor]]:
        """The same from a list of leaves to a list of leaves, for arguments like `args`.

        For loops of small calls, where taking trees apart would cost as much as the arithmetic.
        """
        if self._graph:
            return self._graph[0]
        leaves, treespec = pytree.tree_flatten(args)
        if self.enabled:
            return self._build(leaves, treespec)[0]  # type: ignore[no-any-return]
        return lambda leaves: pytree.tree_leaves(self(*pytree.tree_unflatten(leaves, treespec)))

    def _build(self, leaves: list[Tensor], treespec: pytree.TreeSpec) -> tuple[Any, Any]:
        sizes = [len(pytree.tree_leaves(x)) for x in pytree.tree_unflatten(leaves, treespec)]
        ends = list(itertools.accumulate(sizes))
        donated, fixed = (
            {leaf for i in numbers for leaf in range(ends[i] - sizes[i], ends[i])}
            for numbers in (self.donate, self.in_place)
        )
        if leaves[0].is_cuda:
            self._graph = _captured(lambda x: self._eagerly(pytree.tree_unflatten(x, treespec)), leaves, donated, fixed)
            return self._graph
        signature = [(tuple(x.shape), x.stride(), str(x.dtype), str(x.device)) for x in leaves]
        described = (self.key, self.donate, str(treespec), signature, _toolchain())
        folder = cache_folder() / hashlib.sha256(repr(described).encode()).hexdigest()[:32]

        def build() -> None:  # of clones, as two arguments may be one tensor today and two tomorrow
            apart = [x if i in fixed else x.clone() for i, x in enumerate(leaves)]
            _compile(self.function, apart, treespec, self.donate, folder)

        if not folder.exists():
            build()
        try:
            self._graph = _load(folder)
        except Exception as error:  # a torn or foreign file
            warnings.warn(f"{folder} does not load ({error}); compiling again", stacklevel=3)
            shutil.rmtree(folder)
            build()
            self._graph = _load(folder)
        return self._graph


class CompiledEach:
    """`Compiled`, of one agent's function, for arguments and results with a leading axis of agents.

    A CPU takes one agent after the other, so that its arrays stay in the caches; a GPU, and eager code, all at once.
    """

    def __init__(self, function: Function, key: object, enabled: bool = True, donate: Sequence[int] = ()) -> None:
        self._all = Compiled(vmap(function), key, enabled, donate)
        self._one = Compiled(function, key, enabled, donate)

    def __call__(self, *args: Any) -> Any:
        """As `Compiled`'s."""
        first = leaves_of(args)[0]
        if first.is_cuda or not self._one.enabled:
            return self._all(*args)
        donate = self._one.donate
        found = [self._one(*pytree.tree_map(lambda x, i=i: x[i], args))[len(donate) :] for i in range(len(first))]
        return *(args[i] for i in donate), *pytree.tree_map(lambda *x: torch.stack(x), *found)


def cache_folder() -> Path:
    """Where compiled graphs are kept."""
    return Path(os.environ.get("RL_LAB_CACHE", Path.home() / ".cache" / "rl_lab"))


def _load(folder: Path) -> tuple[Any, Any]:
    """The graph as a function of its leaves, and the tree it returns, with the leaves' numbers for leaves."""
    outspec = pytree.treespec_loads(json.loads((folder / "tree.json").read_text()))
    # `aoti_load_package` would take seconds to import the compiler and to probe the processor, which is in the key.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(folder / "graph.pt2"), "model", True, 1, -1)
    return loader.run, _numbered(outspec)


def _numbered(spec: pytree.TreeSpec) -> Any:
    """The tree with its leaves' numbers for leaves."""
    return pytree.tree_unflatten(range(spec.num_leaves), spec)


def _captured(
    run: Callable[[list[Tensor]], Any], leaves: list[Tensor], donated: set[int], fixed: set[int]
) -> tuple[Callable[[list[Tensor]], list[Tensor]], Any]:
    """`run` as a CUDA graph, and its results' tree as of `_load`.

    The graph works on tensors of its own, for `donated` ones on those of the first call, and of `fixed` ones, which it
    only reads, there must be no others at any call.
    """
    static = [x if i in donated | fixed else x.clone() for i, x in enumerate(leaves)]
    given = [(x, x.clone()) for i, x in enumerate(static) if i not in fixed]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(static)  # kernels are loaded at their first launch, which a capture does not allow
    torch.cuda.current_stream().wait_stream(stream)
    for x, before in given:
        x.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results, spec = pytree.tree_flatten(run(static))

    def replay(leaves: list[Tensor]) -> list[Tensor]:
        foreign = [i for i, x in enumerate(leaves) if x is not static[i]]
        assert not fixed.intersection(foreign), "an argument to be read in place is another tensor than at first"
        for i in foreign:
            static[i].copy_(leaves[i])
        graph.replay()
        for i in donated.intersection(foreign):
            leaves[i].copy_(static[i])
        return [x.clone() for x in results]

    return replay, _numbered(spec)


# The same as torch's `pytree` for trees of dicts, lists and tuples, at a fifth of the time, which small calls feel.


def leaves_of(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    leaves: list[Tensor] = []
    for node in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(node, Tensor):
            leaves.append(node)
        else:
            leaves += leaves_of(node)
    return leaves


def _unflatten(shape: Any, leaves: list[Tensor]) -> Any:
    if isinstance(shape, int):
        return leaves[shape]
    if isinstance(shape, dict):
        return {name: _unflatten(node, leaves) for name, node in shape.items()}
    nodes = [_unflatten(node, leaves) for node in shape]
    return type(shape)(*nodes) if hasattr(shape, "_fields") else type(shape)(nodes)


def _dense(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _donate(given: tuple[Any, ...], results: Any) -> None:
    """Overwrite the trees `given` with the first of `results`; ValueError unless these have the same keys in order."""
    if pytree.tree_structure(given) != pytree.tree_structure(tuple(results[: len(given)])):
        raise ValueError("a donated argument and the result it takes must have the same keys in the same order")
    for old, new in zip(pytree.tree_leaves(given), pytree.tree_leaves(results[: len(given)]), strict=True):
        if old is not new:
            old.copy_(new)


def _check_donations(graph: torch.fx.GraphModule) -> None:
    """Raise ValueError if an argument is to be overwritten with another: torch 2.13 does not order such copies."""
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.copy_.default:
            given, result = node.args[:2]
            while result.target in (torch.ops.aten.clone.default, torch.ops.aten.view.default):
                result = result.args[0]
            if result.op == "placeholder" and result is not given:
                raise ValueError("a donated argument may not be overwritten with another argument as it is")


def _compile(
    function: Function, leaves: list[Tensor], treespec: pytree.TreeSpec, donate: Sequence[int], folder: Path
) -> None:
    # What takes seconds to import is imported where it compiles: a start from the cache does without.
    from torch._functorch.compile_utils import fx_graph_cse
    from torch.fx.experimental.proxy_tensor import make_fx

    outspec: list[pytree.TreeSpec] = []

    def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
        args = pytree.tree_unflatten(leaves, treespec)
        results = function(*args)
        outputs, spec = pytree.tree_flatten(results[len(donate) :] if donate else results)
        outspec.append(spec)
        # Clones, as outputs that are inputs, or each other, would be shared; dense, as the next call takes them so.
        clones = tuple(map(_dense, outputs))
        if donate:
            _donate(tuple(args[i] for i in donate), results)
        return clones

    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise NoCompiler(
            "--compile needs a C++ compiler (g++ or clang++) and found none; install one or pass --no-compile"
        )
    work = folder.with_name(f"{folder.name}.{os.getpid()}")  # beside, then renamed: two processes may compile at once
    work.mkdir(parents=True, exist_ok=True)
    torch.compiler.reset()  # forget shapes of an earlier graph's loop, or this one's would be traced as dynamic
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own deprecations
        graph = make_fx(flat, tracing_mode="fake")(*leaves)
        graph = torch.fx.GraphModule(graph, fx_graph_cse(graph.graph))
        _check_donations(graph)
        program = torch.export.export(graph, tuple(leaves))
        # torch 2.13 declares a buffer twice in C++ where it reuses what came out of a loop, once loops are nested.
        reuse = not any("." in name for name, _ in graph.named_modules())
        configs = {"cpp.use_decompose_tanh": True, "allow_buffer_reuse": reuse, "inplace_buffers": reuse}
        configs["layout_optimization"] = False  # channels_last: the Nature CNN's gradient steps take a tenth longer
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(work / "graph.pt2"), inductor_configs=configs
        )
    (work / "tree.json").write_text(json.dumps(pytree.treespec_dumps(outspec[-1])))
    try:
        work.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(work)


@cache
def _toolchain() -> tuple[str, ...]:
    """What a compiled graph depends on besides its function: sources, packages, processor, threads."""
    root, sources = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.glob("*.py")):
        if path.stem not in _NEVER_TRACED:  # sources of environments and algorithms are in their own keys
            sources.update(path.read_bytes())
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = {line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))}
    versions = torch.__version__, version("gymnasium")  # whose constants classic control takes
    return sources.hexdigest(), *versions, repr(sorted(flags)), str(torch.get_num_threads())
