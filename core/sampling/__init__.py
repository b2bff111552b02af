"""Sampling: parameters of a request, and the reference sampler that every backend must agree with."""

from core.sampling.params import SamplingParams

__all__ = ["SamplingParams"]
