"""The parts of a run as bytes, and back: the LLM's adapter, the optimiser, the gate, classifiers, texts."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from crosslm.data.examples import Examples
from crosslm.data.split import Split
from crosslm.errors import RunError, UploadError
from crosslm.federation.messages import decode_download, decode_upload, encode
from crosslm.gate import Gate
from crosslm.models.slm import SLM
from crosslm.records import Download, SlmState, SyntheticSet, SyntheticText
from crosslm.server import Server


def adapter_bytes(server: Server) -> bytes:
    """Everything of the LLM that is trained, by name."""
    trained = server.llm.model.named_parameters()
    return save({name: value.detach().cpu().contiguous() for name, value in trained if value.requires_grad})


def optimizer_bytes(server: Server) -> bytes:
    """The optimiser's state: its moments and step counts."""
    state = server.optimizer.state_dict()["state"]
    return save({f"{place}.{name}": value.cpu() for place, values in state.items() for name, value in values.items()})


def restore_server(server: Server, adapter: bytes, optimizer: bytes, steps: int, taught: int) -> None:
    """Put the LLM, the optimiser and the counters of steps back.

    Raises:
        RunError: the adapter is of another LLM.
    """
    trained = {name: value for name, value in server.llm.model.named_parameters() if value.requires_grad}
    weights = _load(adapter)
    if {name: value.shape for name, value in weights.items()} != {name: value.shape for name, value in trained.items()}:
        raise RunError("the checkpoint's adapter is of another LLM; has llm.model's folder changed?")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _load(optimizer).items():
        place, name = key.split(".", 1)
        state.setdefault(int(place), {})[name] = value
    server.optimizer.load_state_dict({**server.optimizer.state_dict(), "state": state})
    server.steps, server.taught = steps, taught


def slm_bytes(state: SlmState) -> bytes:
    """A classifier, as it would travel."""
    return encode(Download("", 0, 0, {}, state))


def slm_digest(slm: SLM) -> str:
    """SHA-256 of a classifier's weights and vocabulary, which do not depend on how a library writes the rest."""
    digest = hashlib.sha256(json.dumps(sorted(slm.tokenizer.get_vocab().items())).encode("utf-8", "surrogatepass"))
    digest.update(save(slm.to_state().weights))
    return f"sha256:{digest.hexdigest()}"


def check_models(then: Mapping[str, str], now: Mapping[str, str], comes_not: Collection[str]) -> None:
    """Find out that clients that are still to come begin with the models that they had when the run began.

    Args:
        then: of each client what :func:`slm_digest` gave.
        now: the same of the models that are there.
        comes_not: clients that are not asked for theirs any more.

    Raises:
        RunError: they do not; names them.
    """
    if changed := [who for who, digest in now.items() if who not in comes_not and then.get(who) != digest]:
        raise RunError(
            f"the model that {', '.join(changed)} begins with has changed since this run began (slm.models, the "
            "client's own, or the libraries); put it back as it was, or begin another run"
        )


def slm_state(data: bytes) -> SlmState:
    """The classifier that :func:`slm_bytes` wrote."""
    try:
        return decode_download(data).slm
    except UploadError as error:
        raise RunError(
            f"the checkpoint's classifier cannot be read: {error}; delete that checkpoint to go on from the one before"
        ) from error


def texts_bytes(texts: SyntheticSet) -> bytes:
    """Synthetic texts with all that is known of them."""
    return json.dumps(asdict(texts)).encode()


def texts_of(data: bytes) -> SyntheticSet:
    """The texts that :func:`texts_bytes` wrote."""
    fields = json.loads(data)
    samples = [
        SyntheticText(**sample | {name: tuple(sample[name]) for name in ("prompt_ids", "completion_ids")})
        for sample in fields["samples"]
    ]
    return SyntheticSet(samples, fields["removed"], fields["tokens_generated"])


def gate_bytes(gate: Gate) -> bytes:
    """What the gate remembers of accepted SLMs; tensors are named by a number, since a client is named by anyone."""
    remembered = json.dumps({"clients": list(gate.references), "latest": asdict(gate.latest)})
    tensors = {str(place): value.contiguous() for place, value in enumerate(gate.references.values())}
    return save(tensors, metadata={"gate": remembered})


def restore_gate(gate: Gate, data: bytes) -> None:
    """The other way round."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    remembered, values = json.loads(header["__metadata__"]["gate"]), _load(data)
    gate.references = {name: values[str(place)] for place, name in enumerate(remembered["clients"])}
    gate.latest = Examples(**remembered["latest"])


def keep_teachers(server: Server, put: Callable[[bytes], str]) -> list[str]:
    """The names under which ``put`` has kept the uploads of those who judge beside an arriving SLM."""
    for member in server.teachers.members.values():
        member.kept_as = member.kept_as or put(encode(member.upload))
    return [member.kept_as for member in server.teachers.members.values()]


def restore_teachers(server: Server, names: list[str], get: Callable[[str], bytes]) -> None:
    """The other way round."""
    for name in names:
        server.remember(decode_upload(get(name)))


def server_state(server: Server, put: Callable[[bytes], str]) -> dict[str, Any]:
    """What a checkpoint has of a server beside the adapter; what is large by the name that ``put`` gives it."""
    return {
        "steps": server.steps,
        "taught": server.taught,
        "llm": server.llm.original_digest,
        "optimizer": put(optimizer_bytes(server)),
        "gate": put(gate_bytes(server.gate)) if server.gate else None,
        "teachers": keep_teachers(server, put),
    }


def go_back_to(server: Server, record: Mapping[str, Any], get: Callable[[str], bytes]) -> None:
    """The other way round.

    Args:
        server: as it was when the run began, before its first step.
        record: a checkpoint, whose state has what :func:`server_state` gave.
        get: reads what was kept under a name.

    Raises:
        RunError: the checkpoint is damaged, or of another LLM.
    """
    state = record["state"]
    now = server.llm.original_digest
    if state.get("llm", now) != now:  # checkpoints of earlier versions do not have it
        raise RunError(
            "the original LLM has changed since this run began (llm.model or llm.vocabulary_texts); put it back as it "
            "was, or begin another run"
        )
    restore_server(server, get(record["adapter"]), get(state["optimizer"]), state["steps"], state["taught"])
    if server.gate:
        restore_gate(server.gate, get(state["gate"]))
    restore_teachers(server, state["teachers"], get)


def inputs_digest(split: Split, public: Examples, perplexity_text: str | None) -> str:
    """SHA-256 over all text that a run reads, but for that of ``llm.vocabulary_texts``: has a file changed since?"""
    everything: dict[str, Any] = asdict(split) | {"warnings": []}
    everything |= {"public": asdict(public), "perplexity_text": perplexity_text}
    return "sha256:" + hashlib.sha256(json.dumps(everything).encode("utf-8", "surrogatepass")).hexdigest()


def _load(data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except SafetensorError as error:
        raise RunError(
            f"the checkpoint's tensors cannot be read: {error}; delete that checkpoint to go on from the one before"
        ) from error
