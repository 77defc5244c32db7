"""An LSTM language model that dllm made, for transformers 4.57 and later: AutoModelForCausalLM loads it from here.

dllm puts this file into model folders and never imports it. Licence: Apache-2.0.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

State = list[Tensor]  # h, c (layers, batch, hidden) of nn.LSTM, behind all that was read


class DllmConfig(PretrainedConfig):
    """The shape of a model. What else dllm wrote of it stays, but for the hash of its weights, which others may change."""

    model_type = "dllm-lstm"

    def __init__(
        self,
        vocab_size: int = 256,
        embedding_size: int = 128,  # 0: inputs are one-hot
        hidden_size: int = 128,
        num_hidden_layers: int = 1,
        sha256: str | None = None,
        **others: Any,
    ) -> None:
        self.vocab_size, self.embedding_size = vocab_size, embedding_size
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        others.setdefault("tie_word_embeddings", False)
        super().__init__(**others)


@dataclass
class DllmOutput(ModelOutput):
    """What forward gives."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (batch, time, vocab_size), of the token that follows
    state: State | None = None


class DllmForCausalLM(PreTrainedModel, GenerationMixin):
    """nn.Embedding, nn.LSTM and nn.Linear, whose state goes on from call to call, as a cache does in other models."""

    config_class = DllmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _is_stateful = True  # tokens cannot be taken back, so none are drafted
    _tied_weights_keys = {"output.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config: DllmConfig) -> None:
        super().__init__(config)
        V, E, H = config.vocab_size, config.embedding_size, config.hidden_size
        if E:
            self.embedding = nn.Embedding(V, E)
        self.lstm = nn.LSTM(E or V, H, config.num_hidden_layers, batch_first=True)
        self.output = nn.Linear(H, V)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        """The embedding; None where inputs are one-hot."""
        return getattr(self, "embedding", None)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Take another embedding."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Take another output layer."""
        self.output = value

    def _init_weights(self, module: nn.Module) -> None:
        """Modules begin as PyTorch makes them."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: State | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> DllmOutput | tuple[Any, ...]:
        """Read tokens (batch, time) behind `state`; None: they are the first.

        attention_mask : of its last `time` columns, 0 is no token, on whichever side; a row becomes what it is alone
        labels : tokens (batch, time) to predict, moved by one here; -100 is none
        """
        V = self.config.vocab_size
        tokens = input_ids.masked_fill(input_ids == V, 0)  # the padding token is beyond the vocabulary
        if self.config.embedding_size:
            x = self.embedding(tokens)
        else:
            x = nn.functional.one_hot(tokens, V).to(self.output.weight.dtype)
        before = None if state is None else (state[0], state[1])
        mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :]
        if mask is None or mask.all():
            y, after = self.lstm(x, before)
        else:
            y, after = self._read_masked(x, mask, before)
        logits, loss = self.output(y), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=V, **others)
        found = DllmOutput(loss=loss, logits=logits, state=list(after))
        return found.to_tuple() if return_dict is False else found

    def _read_masked(self, x: Tensor, mask: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What nn.LSTM makes of the steps of each row that count, which are put first for it, and put back."""
        order = (mask == 0).long().argsort(dim=1, stable=True)
        lengths = mask.ne(0).sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(_reordered(x, order), lengths, batch_first=True, enforce_sorted=False)
        y, after = self.lstm(packed, before)
        y, _ = pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])
        return _reordered(y, order.argsort(dim=1)), after

    # How `generate` hands the state on. It lies in a list under both of the names that versions of transformers know, so that
    # a beam search, which gives rows new places, changes what all of them see.

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: State | None = None, attention_mask: Tensor | None = None, **others: Any
    ) -> dict[str, Any]:
        """All of the prompt, and later the last token."""
        if state is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        return {"input_ids": input_ids[:, -1:], "state": state}

    def _update_model_kwargs_for_generation(self, outputs: DllmOutput, model_kwargs: dict[str, Any], *rest: Any, **others: Any):
        found = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *rest, **others)
        found["state"] = found["past_key_values"] = outputs.state
        return found

    def _reorder_cache(self, state: State, beams: Tensor) -> State:
        state[:] = [part.index_select(1, beams.to(part.device)) for part in state]
        return state

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, *rest: Any, **others: Any) -> None:
        """There is nothing to prepare."""


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """x (batch, time, D) with the steps of each row in the order (batch, time)."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
