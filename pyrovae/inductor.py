"""From a traced graph of tensor operations to compiled code, by torch's inductor."""

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# the random numbers of the function itself, in its order; tanh by exp, three times as fast, to 2e-7 in float32
OPTIONS = {"fallback_random": True, "reorder_for_peak_memory": False, "cpp.use_decompose_tanh": True}


class CompileError(RuntimeError):
    """A program whose structure depends on values, or a machine without a compiler."""


def keep_draws(graph: torch.fx.GraphModule) -> None:
    """Give out all random numbers that nothing uses, lest they be left out and later ones come in their place."""
    output: Any = graph.graph.output_node()
    needed: set[Any] = set()
    for node in reversed(graph.graph.nodes):
        if node.op == "output" or not needed.isdisjoint(node.users):
            needed.add(node)
    unused: list[Any] = [
        node
        for node in graph.graph.nodes
        if node not in needed and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]
    for node in unused:  # a draw that has several results has the first one first
        several = len(node.target._schema.returns) > 1
        with graph.graph.inserting_before(output):
            first = graph.graph.call_function(operator.getitem, (node, 0)) if several else node
        output.args = ([*output.args[0], first],)
    graph.recompile()


def copy_views(graph: torch.fx.GraphModule) -> None:
    """Give out no tensor that shares memory with an argument or a parameter."""
    output: Any = graph.graph.output_node()
    given = []
    outputs: Any = output.args[0]
    for node in outputs:
        base = node
        while base.op == "call_function" and _is_view(base.target):
            base = base.args[0]
        if base.op in ("placeholder", "get_attr"):
            with graph.graph.inserting_before(output):
                node = graph.graph.call_function(torch.ops.aten.clone.default, (node,))
        given.append(node)
    output.args = (given,)
    graph.recompile()


def _is_view(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.returns[0].alias_info is not None


def compile_graph(graph: torch.fx.GraphModule, tensors: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """The graph compiled for tensors like these; on a GPU captured as a CUDA graph.

    Raises:
        CompileError: where there is no C++ compiler, or inductor cannot compile the graph.
    """
    on_gpu = any(t.is_cuda for t in (*tensors, *graph.parameters(), *graph.buffers()))
    try:
        with torch.no_grad(), torch._C._DisableAutocast(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's, of itself
            from torch._inductor.compile_fx import compile_fx
            from torch._inductor.decomposition import select_decomp_table
            from torch._inductor.lowering import constrain_to_fx_strides, lowerings, make_fallback

            # draws are made by torch's own operations, not by what inductor would put in their place
            table = dict(select_decomp_table())
            for op in [op for op in table if torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())]:
                del table[op]
                if op not in lowerings:  # implicitly so, too, but not where the environment has CI
                    make_fallback(op, constrain_to_fx_strides, warn=False, override_decomp=True)
            table[torch.ops.aten.log_sigmoid_forward.default] = _log_sigmoid_forward
            options: dict[str, Any] = {**OPTIONS, "triton.cudagraphs": on_gpu}
            examples: list[Any] = [tensor.detach() for tensor in tensors]
            run: Any = compile_fx(graph, examples, config_patches=options, decompositions=table)
            return run
    except Exception as error:
        if "InvalidCxxCompiler" in f"{type(error).__name__} {error}":
            raise CompileError(
                "Expected a C++ compiler, which compiling needs; torch finds none. Install g++, or name one by the "
                "environment variable CXX, or run uncompiled (compile=False)"
            ) from error
        raise CompileError(
            f"Expected a program that torch's inductor compiles; it fails with {first_line(error)}. "
            "Run uncompiled (compile=False)"
        ) from error


def _log_sigmoid_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """log sigmoid(x) = min(x, 0) - log(1 + e), e = exp(-|x|), in float32 without a logarithm, right to 3e-7.

    log(1 + e) = 2 artanh(s), s = e / (2 + e), whose power series to s^13 does it, as s is at most 1/3.
    """
    e = (-x.abs()).exp()
    if x.dtype == torch.float32:
        s = e / (2 + e)
        series = torch.full_like(s, 1 / 13)
        for k in (11, 9, 7, 5, 3, 1):
            series = series * (s * s) + 1 / k
        log1p = 2 * s * series
    else:
        log1p = e.log1p()
    return x.clamp(max=0) - log1p, e


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
