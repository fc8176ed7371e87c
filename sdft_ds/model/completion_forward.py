"""Patches a causal LM's forward to return hidden states, log-probabilities or the loss at requested positions.

Shapes: R rows, T positions per row, N requested completion tokens, V vocabulary, D hidden.

Inside `RequestForward(model)` the model's forward takes another keyword, `request`. Given one, the decoder runs as
usual, but only the N requested positions are passed to the head, which computes the answer (log-probabilities, loss)
instead of logits. This happens inside the wrapped model's forward because that is where DDP sees the gradient and
ZeRO-3 gathers the head: the head module is called once, with all chunks inside.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdft_ds.loss.chunked import (
    HeadValues,
    LogitsTransform,
    LossTerms,
    chunked_distillation_loss,
    chunked_token_log_probs,
    whole_logits,
)
from sdft_ds.loss.diagnostics import TokenDiagnostics, token_diagnostics
from sdft_ds.model.lm_head import tensors_of as head_tensors
from sdft_ds.model.modes import evaluating
from sdft_ds.model.skinny_gemm import PLAIN_FORWARD

# Config attribute -> logits transform after the head. `check` rejects models with any other transform.
LOGITS_TRANSFORMS = {
    "logits_scaling": lambda value: lambda logits: logits / value,  # Granite
    "logit_scale": lambda value: lambda logits: logits * value,  # Cohere
    "final_logit_softcapping": lambda value: lambda logits: torch.tanh(logits / value) * value,  # Gemma 2
}


@dataclass
class HiddenStates:
    """Request the last hidden states at flat positions (row x T + position) of the batch: [N, D]."""

    positions_N: Tensor


@dataclass
class TokenLogProbs:
    """Request the log-probability of each token: [N] fp32, without grad."""

    positions_N: Tensor
    tokens_N: Tensor
    temperature: float

    def answer(self, hidden_ND: Tensor, head: HeadValues, finish: LogitsTransform) -> Tensor:
        return chunked_token_log_probs(hidden_ND, head, self.tokens_N, self.temperature, finish)


@dataclass
class DistillationLoss:
    """Request the loss: a scalar, scale x sum of weight x divergence; sets `per_token_N` to the divergences.

    With terms.with_log_probs it sets `log_probs_N` to the student's log-probabilities. inspect_M: indices of the loss
    tokens for which `seen` is set to diagnostics of student and teacher.
    """

    positions_N: Tensor
    terms: LossTerms
    scale: Tensor
    chunk_tokens: int | None = None
    inspect_M: Tensor | None = None
    per_token_N: Tensor | None = None
    log_probs_N: Tensor | None = None
    seen: TokenDiagnostics | None = None

    def answer(self, hidden_ND: Tensor, head: HeadValues, finish: LogitsTransform) -> Tensor:
        # Stored on the request, not returned: DDP and ZeRO-3 hook every tensor that a module outputs.
        loss, self.per_token_N, self.log_probs_N = chunked_distillation_loss(
            hidden_ND, head, self.terms, self.scale, finish, self.chunk_tokens
        )
        if self.inspect_M is not None:
            self.seen = token_diagnostics(hidden_ND, head, self.terms, finish, self.inspect_M)
        return loss


@dataclass
class Logits:
    """Request the logits; used by `check` only."""

    positions_N: Tensor

    def answer(self, hidden_ND: Tensor, head: HeadValues, finish: LogitsTransform) -> Tensor:
        return whole_logits(hidden_ND, head, finish)


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: nn.Module) -> nn.Module:
    """The LM head module; raises ValueError if the loss does not support it."""
    head = causal_lm_of(model).get_output_embeddings()
    head_tensors(head)
    return head


class RequestForward:
    """Context manager: inside, a model's forward takes the keyword `request`; calls without it behave as before.

    Outside, the model is as its owner left it, and can be copied, pickled, merged or trained by other code. Wrappers
    that others put around the forward inside (accelerate: autocast) are removed on exit and restored on the next
    entry, until `renew`. Reentrant: a nested entry changes nothing.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.depth = 0
        self.outside: _Attributes = {}  # the owner's
        self.inside: _Attributes = {}  # as of the last exit

    def __enter__(self) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        causal_lm, head = causal_lm_of(self.model), head_of(self.model)
        modules = list(dict.fromkeys((self.model, causal_lm, head)))
        self.outside = _attributes(modules)
        if PLAIN_FORWARD in vars(causal_lm):  # patched by another RequestForward
            self.inside = {}
        elif list(self.inside) == modules:
            _set_attributes(self.inside)
        else:
            _install(causal_lm, head)

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.inside = _attributes(list(self.outside))
            _set_attributes(self.outside)

    def renew(self) -> None:
        """Called inside: drop wrappers that others have put around the forward, which they will apply again."""
        causal_lm, head = causal_lm_of(self.model), head_of(self.model)
        _set_attributes(self.outside)
        if PLAIN_FORWARD not in vars(causal_lm):
            _install(causal_lm, head)


# Attributes set on model and head, here and by accelerate, which does not remove its own.
_SET_ON_MODULES = ("forward", PLAIN_FORWARD, "_original_forward", "_is_accelerate_prepared")
_Attributes = dict[nn.Module, dict[str, Any]]


def _attributes(modules: list[nn.Module]) -> _Attributes:
    return {
        module: {name: vars(module)[name] for name in _SET_ON_MODULES if name in vars(module)} for module in modules
    }


def _set_attributes(attributes: _Attributes) -> None:
    for module, values in attributes.items():
        for name in _SET_ON_MODULES:
            vars(module).pop(name, None)
        vars(module).update(values)


def _install(causal_lm: PreTrainedModel, head: nn.Module) -> None:
    for module, forward in ((causal_lm, _model_forward), (head, _head_forward)):
        setattr(module, PLAIN_FORWARD, module.forward)
        # A bound method, not a closure over the module, so that a deep copy of the model gets its own. The signature
        # stays the model's, because transformers inspects it for the accepted inputs.
        module.forward = types.MethodType(_with_signature_of(type(module).forward, forward), module)


def _with_signature_of(original: Callable, function: Callable) -> Callable:
    @functools.wraps(original)
    def forward(*args, **kwargs):
        return function(*args, **kwargs)

    return forward


def _model_forward(causal_lm: PreTrainedModel, *args, request=None, **kwargs):
    if request is None:
        return causal_lm.sdft_plain_forward(*args, **kwargs)
    hidden_RTD = causal_lm.base_model(**{"use_cache": False, **kwargs}).last_hidden_state
    hidden_ND = hidden_RTD.flatten(0, 1)[request.positions_N]
    if isinstance(request, HiddenStates):
        return hidden_ND
    return causal_lm.get_output_embeddings()(hidden_ND, request=request, finish=_logits_transform(causal_lm.config))


def _head_forward(head: nn.Module, hidden, request=None, finish=None):
    if request is None:
        return head.sdft_plain_forward(hidden)
    return request.answer(hidden, head_tensors(head).values(), finish)


def _logits_transform(config) -> LogitsTransform:
    """The composed logits transforms in the model's config; None if there are none."""
    text_config = config.get_text_config()
    steps = [
        make(getattr(text_config, name))
        for name, make in LOGITS_TRANSFORMS.items()
        if getattr(text_config, name, None) is not None
    ]

    if not steps:
        return None

    def finish(logits: Tensor) -> Tensor:
        for step in steps:
            logits = step(logits)
        return logits

    return finish


@torch.no_grad()
def check(model: nn.Module, engine: nn.Module, device: torch.device) -> None:
    """Compare the model's own logits with ours on a few tokens. Raises ValueError, naming the model, if they differ
    or if the model is not causal.

    This makes unknown architectures safe to accept: a model with a logits transform missing from LOGITS_TRANSFORMS is
    rejected before the first step. Every rank runs the same two forwards.
    """
    causal_lm = causal_lm_of(model)
    name, vocabulary = type(causal_lm).__name__, causal_lm.config.get_text_config().vocab_size
    ids_T = torch.arange(8, device=device) * 7919 % vocabulary
    ids_RT = torch.stack([ids_T, ids_T])
    ids_RT[1, -1] = (ids_T[-1] + 1) % vocabulary
    mask, positions_N = torch.ones_like(ids_RT), torch.arange(16, device=device)
    with evaluating(engine):
        own_RTV = engine(input_ids=ids_RT, attention_mask=mask, use_cache=False).logits.float()
        ours_NV = engine(input_ids=ids_RT, attention_mask=mask, request=Logits(positions_N)).float()
    # bf16 has 8 bits of precision, and the two products differ in shape, hence in summation order.
    tolerance = 3e-2 * own_RTV.abs().max().clamp(min=1.0)
    if (own_RTV[0, :-1] - own_RTV[1, :-1]).abs().max() > tolerance:
        raise ValueError(
            f"{name} is not causal: its tokens see those after them. Set is_decoder in its configuration."
        )
    difference = (own_RTV.flatten(0, 1) - ours_NV).abs().max()
    if difference > tolerance:
        raise ValueError(
            f"{name} changes its logits after the head in a way that is not supported (largest difference "
            f"{difference:.3g}). Supported: {', '.join(LOGITS_TRANSFORMS)}."
        )
