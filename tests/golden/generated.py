"""Tensors that a case does not store: inputs and parameters from an integer hash, outputs as slices or statistics."""

import ast
import hashlib
import math
import operator
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_STEPS = "32 8 32 1 2654435761 40503 2 32 16 73244475 2 32 16 73244475 2 32 16 2 32 0.5 64"
"""The numbers in the description of the hash that `uniform` implements."""


def uniform(name: str, shape: Sequence[int], case_number: int) -> np.ndarray:
    """float64 numbers in [-0.5, 0.5), a function of the key's name and the element's place."""
    seed = zlib.crc32(name.encode()) ^ case_number
    x = np.arange(1, math.prod(shape) + 1, dtype=np.uint32)  # arithmetic of this type is modulo 2**32
    x *= np.uint32(2654435761)
    x += np.uint32(seed * 40503 % 2**32)
    for _ in range(2):
        x ^= x >> np.uint32(16)
        x *= np.uint32(73244475)
    x ^= x >> np.uint32(16)
    return (x / 2.0**32 - 0.5).reshape(tuple(shape))


class Generator:
    """Tensors by the rules that a case states; unknown rules fail."""

    def __init__(self, description: Mapping[str, Any], case_number: int) -> None:
        """`description` is the case's `generator`: `steps` of the hash, `rules_in_order`, and `input_rule` and others
        of the form `EXPRESSION with key name NAME`."""
        numbers = " ".join(re.findall(r"\d+(?:\.\d+)?", " ".join(description["steps"])))
        assert numbers == _STEPS, f"another hash than the known one: {description['steps']}"
        self.case_number = case_number
        self.rules = [_parameter_rule(rule) for rule in description["rules_in_order"]]
        self.inputs = dict(_input_rule(text) for key, text in description.items() if key.endswith("_rule"))

    def parameter(self, name: str, like: Tensor) -> Tensor:
        """The parameter or buffer of a reference name, with the shape and dtype of `like`."""
        expression = next(rule for applies, rule in self.rules if applies(name, like.shape))
        return self._make(name, expression, like.shape).to(like.dtype)

    def input(self, name: str, shape: Sequence[int]) -> Tensor:
        """An input of a given name and shape; float32, or int64 where the rule rounds."""
        assert name in self.inputs, f"no rule says how the input {name!r} is made; there are {sorted(self.inputs)}"
        made = self._make(name, self.inputs[name], shape)
        return made.long() if re.search(r"floor|round|//", self.inputs[name]) else made

    def _make(self, name: str, expression: str, shape: Sequence[int]) -> Tensor:
        u = uniform(name, shape, self.case_number)
        value = evaluate(expression, {"u": u, "n": u.size, "shape": tuple(shape)})
        return torch.from_numpy(np.broadcast_to(np.asarray(value, np.float32), u.shape).copy())


def _parameter_rule(text: str) -> tuple[Callable[[str, Sequence[int]], bool], str]:
    condition, separator, expression = text.partition(":")
    assert separator, f"not a rule: {text!r}"
    if condition == "otherwise":
        return lambda _name, _shape: True, expression
    if condition == "two or more dimensions":
        return lambda _name, shape: len(shape) >= 2, expression
    if found := re.fullmatch(r"key (ends with|starts with|contains) (.+)", condition):
        parts = tuple(re.split(r"\s+or\s+|,\s*", found[2]))
        match found[1]:
            case "ends with":
                return lambda name, _shape: name.endswith(parts), expression
            case "starts with":
                return lambda name, _shape: name.startswith(parts), expression
            case _:
                return lambda name, _shape: any(part in name for part in parts), expression
    raise AssertionError(f"a rule for {condition!r}, which is not understood")


def _input_rule(text: str) -> tuple[str, str]:
    found = re.match(r"(.+?) with key name (\w+)", text)
    assert found, f"not a rule for an input: {text!r}"
    return found[2], found[1]


_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"sqrt": np.sqrt, "floor": np.floor, "round": np.round, "abs": np.abs}


def evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """Value of an arithmetic expression over the given names; anything else fails."""

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Subscript(value=sequence, slice=index):
                return value(sequence)[value(index)]
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*map(value, arguments))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
        raise AssertionError(f"{expression!r}: {ast.dump(node)} is not arithmetic")

    return value(ast.parse(expression.strip(), mode="eval"))


def slices_in(text: str) -> dict[str, tuple[slice, ...]]:
    """`out.a.i: maps [:, ::16]; out.b is subsampled [::4, ::4]` -> slices by key, without the `.i`."""
    found = {}
    for clause in text.split(";"):
        bracket = re.search(r"\[([-:\d,\s]*:[-:\d,\s]*)\]", clause)
        if bracket:
            parts = tuple(
                slice(*(int(n) if n.strip() else None for n in part.split(":"))) for part in bracket[1].split(",")
            )
            for key in re.findall(r"\b((?:out|in|after|grad)\.[\w.]*\w)", clause[: bracket.start()]):
                found[key.removesuffix(".i")] = parts
    return found


def cut(tensor: Tensor, parts: tuple[slice, ...], shape: Sequence[int]) -> Tensor:
    """Part with the recorded shape, by slices of the first or of the last dimensions.

    Without fitting slices, every k-th element of each dimension, if there is such a k; else the whole.
    """
    every = tuple(slice(None, None, -(-own // max(side, 1))) for own, side in zip(tensor.shape, shape, strict=False))
    for index in (parts, (..., *parts), every if tensor.ndim == len(shape) else ()):
        if len(index) <= tensor.ndim + 1 and tensor[index].shape == tuple(shape):
            return tensor[index]
    return tensor


STATISTICS: Mapping[str, Callable[[Tensor], Any]] = {
    "mean": lambda x: x.mean(),
    "abs_mean": lambda x: x.abs().mean(),
    "std": lambda x: x.std(),
    "var": lambda x: x.var(),
    "min": lambda x: x.min(),
    "max": lambda x: x.max(),
    "abs_max": lambda x: x.abs().max(),
    "sum": lambda x: x.sum(),
    "abs_sum": lambda x: x.abs().sum(),
    "norm": lambda x: x.norm(),
    "rms": lambda x: x.square().mean().sqrt(),
    "numel": lambda x: x.numel(),
}
"""Name of a statistic -> its function of a float64 tensor."""

SPELLINGS = {
    "mean_abs": "abs_mean", "absmean": "abs_mean", "max_abs": "abs_max", "absmax": "abs_max", "l2": "norm",
    "l2_norm": "norm", "sum_abs": "abs_sum", "l1": "abs_sum", "variance": "var", "minimum": "min", "maximum": "max",
    "count": "numel", "size": "numel",
}  # fmt: skip
DIGESTS = ("sha256", "sha1", "md5", "crc32")


def digest(tensor: Tensor, algorithm: str) -> str:
    """Hexadecimal digest of the values as little-endian bytes in row-major order."""
    content = np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes()
    return f"{zlib.crc32(content):08x}" if algorithm == "crc32" else hashlib.new(algorithm, content).hexdigest()
