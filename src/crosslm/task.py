"""A classification task: labels, prompts and verbalizers as data (CrossLM, section 3)."""

from dataclasses import dataclass

from crosslm.config import TaskConfig


@dataclass(frozen=True)
class Task:
    """Labels and the words around them. Labels are known by name; an index is a place in ``labels``."""

    labels: tuple[str, ...]
    query_template: str
    prompts: tuple[tuple[str, ...], ...]
    statements: tuple[tuple[str, ...], ...]
    verbalizers: tuple[str, ...]

    @classmethod
    def from_config(cls, config: TaskConfig) -> "Task":
        """The task that a checked configuration table describes."""
        return cls(
            labels=config.labels,
            query_template=config.query,
            prompts=tuple(config.prompt[label] for label in config.labels),
            statements=tuple(config.statement[label] for label in config.labels),
            verbalizers=tuple(config.verbalizer[label] for label in config.labels),
        )

    def query(self, text: str) -> str:
        """M(x) of Eq. 1: the text wrapped so that a space and the verbalizer come next."""
        return self.query_template.replace("{text}", text).rstrip()

    def prompt(self, label: int, paraphrase: int) -> str:
        """M(y) of Eq. 3: what the LLM is given to write a text of this label."""
        return self.prompts[label][paraphrase]

    def stated(self, text: str, label: int, paraphrase: int) -> str:
        """``[x, M'(y)]`` of Eq. 7: the text followed by a statement of its label."""
        statement = self.statements[label][paraphrase]
        return statement.replace("{text}", text) if "{text}" in statement else f"{text} {statement}"
