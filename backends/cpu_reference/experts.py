"""Routing and routed experts, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from backends.cpu_reference.arithmetic import glu, product, sigmoid, softmax, wide
from core.contract.opspecs import ExpertsSpec, ExpertWeights, RouteSpec

Array = npt.NDArray[Any]


def best(values: Array, count: int) -> Array:
    """Indices of the `count` largest values, best first, ties to the lowest index."""
    return np.argsort(-values, kind="stable")[:count]


def route_token(logits: Array, spec: RouteSpec, bias: Array | None) -> tuple[Array, Array]:
    """Ids [top_k] and weights [top_k] for one token's logits [E]; the order of steps is in `RouteSpec`."""
    scores = logits
    if spec.scoring == "softmax":
        scores = softmax(logits)
    elif spec.scoring == "sigmoid":
        scores = sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if spec.num_groups > 1:
        groups = choice.reshape(spec.num_groups, -1)
        counted = 1 if spec.group_score == "max" else 2
        group_scores = np.array([group[best(group, counted)].sum() for group in groups])
        kept = best(group_scores, spec.top_groups)
        masked = np.full(groups.shape, -np.inf)
        masked[kept] = groups[kept]
        choice = masked.reshape(-1)
    ids = best(choice, spec.top_k)
    weights = scores[ids]
    if spec.scoring == "softmax_topk":
        weights = softmax(weights)
    if spec.normalize:
        weights = weights / (weights.sum() + 1e-20)
    return ids, weights * spec.scale


def route(logits: Any, spec: RouteSpec, bias: Any | None) -> tuple[Array, Array]:
    """As `Ops.route`; weights are float64."""
    T = logits.shape[0]
    ids, weights = np.empty((T, spec.top_k), np.int32), np.empty((T, spec.top_k))
    for t in range(T):
        ids[t], weights[t] = route_token(wide(logits[t]), spec, None if bias is None else wide(bias))
    return ids, weights


def expert(x: Array, slot: int, packed: ExpertWeights, spec: ExpertsSpec) -> Array:
    """One token x [D] through one expert -> [D]."""
    in_bias = None if packed.gate_up_bias is None else packed.gate_up_bias[slot]
    out_bias = None if packed.down_bias is None else packed.down_bias[slot]
    hidden = glu(product(x, packed.gate_up[slot], in_bias), spec.activation, spec.limit)
    return product(hidden, packed.down[slot], out_bias)


def experts(
    x: Any, ids: Any, weights: Any, packed: ExpertWeights, spec: ExpertsSpec, slot_of_expert: Any | None
) -> Array:
    """As `Ops.experts`, in float64: each token's experts are added in the order of its `ids`."""
    out = np.zeros(x.shape)
    for t in range(x.shape[0]):
        for chosen, weight in zip(ids[t], weights[t], strict=True):
            slot = int(chosen if slot_of_expert is None else slot_of_expert[chosen])
            if slot < 0:  # the expert is on another rank
                continue
            if spec.weights_on_input:
                out[t] += expert(wide(x[t]) * weight, slot, packed, spec)
            else:
                out[t] += weight * expert(wide(x[t]), slot, packed, spec)
    return out
