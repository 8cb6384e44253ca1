"""What the target is given before it writes: the template's text around turns, and beginnings of plain texts."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.text.chat_template import ChatTemplate
from server.text.errors import ChatTemplateError
from server.text.tokenizer import Tokenizer

USER_OPENINGS = (
    "What", "How", "Why", "When", "Who", "Which", "Can you", "Could you explain", "Please", "Write", "Write a story",
    "Write a Python function", "Write a poem", "Write an email", "Explain", "Describe", "List", "Give me", "Compare",
    "Summarize the following text:", "Summarize", "Translate", "Rewrite the following", "Correct", "Extract",
    "Classify", "Answer the question", "Read the passage below", "Based on the following", "Solve", "Calculate",
    "Imagine", "Pretend you are", "Design", "Suggest", "Create a table", "Fix this code:", "Here is", "I want", "I am",
    "My", "Is it", "Do you", "Tell me about", "Help me", "Let's", "If", "Given", "The", "In",
)  # fmt: skip
"""First words of requests, so that rare kinds of them are not left to chance."""

TEXT_OPENINGS = (
    "The ", "A ", "In ", "It was ", "Once ", "When ", "This ", "There ", "Many ", "As ", "If ", "To ", "We ", "She ",
    "He ", "They ", "Abstract: ", "Chapter 1\n", "Introduction\n", "Dear ", "Question: ", "Problem: ", "Step 1: ",
    "1. ", "- ", "# ", "## ", "| ", "> ", "\"", "{\n", "[", "<html>", "<div", "```python\n", "def ", "import ",
    "from ", "class ", "#include <", "function ", "const ", "public ", "SELECT ", "#!/bin/bash\n", "package ", "let ",
)  # fmt: skip

PASSAGE_TASKS = (
    ("Summarize the following text:\n\n", "", False), ("", "\n\nSummarize the text above in one sentence.", False),
    ("Read this passage and answer the question.\n\n", "\n\nQuestion:", True), ("", "\n\nWhat", True),
    ("Context: ", "\n\nBased on the context, ", True), ("Rewrite this text more simply:\n\n", "", False),
    ("Translate into French: ", "", False), ("Translate the following text to German:\n\n", "", False),
    ("Correct the mistakes in this text:\n\n", "", False), ("List the names and numbers in this text:\n\n", "", False),
    ("Extract the main points as a list:\n\n", "", False), ("Continue this text:\n\n", "", False),
    ("Find the bug and rewrite the code:\n\n", "", False), ("Explain what this says:\n\n", "", False),
    ("Here are some documents.\n\nDocument 1: ", "\n\nUsing only the documents, ", True),
    ("", "\n\nCan you", True), ("Turn this into an email:\n\n", "", False), ("Give this text a title:\n\n", "", False),
)  # fmt: skip
"""Requests about a text: what stands before it and behind, and whether the target goes on writing the request there."""


@dataclass(slots=True)
class Prompts:
    """Token ids of what surrounds the target's own words. Without a chat template there are plain texts only."""

    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    _pieces: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)

    @staticmethod
    def of(tokenizer: Tokenizer) -> Prompts:
        """Those of a model's own template. Raises ChatTemplateError if it is broken."""
        source = tokenizer.chat_template
        return Prompts(tokenizer, None if source is None else ChatTemplate(source, tokenizer.special_tokens))

    def pieces(self, turn: int) -> tuple[list[int], list[int]]:
        """What stands before the user's words of 0-based `turn`, back to the last answer's, and what between them and
        the answer. Raises ChatTemplateError where the template does not show messages as they are."""
        found = self._pieces.get(turn)
        if found is None:
            found = self._pieces[turn] = self._find(turn)
        return found

    def end_ids(self) -> frozenset[int]:
        """Special tokens that end a turn: the one the template puts behind the user's words, and end of sequence."""
        ends = set(self.tokenizer.eos_token_ids)
        if self.template is not None:
            after = self.pieces(0)[1]
            ends |= {next((i for i in after if i in self.tokenizer.special_ids), -1)} - {-1}
        return frozenset(ends)

    def words(self, text: str) -> list[int]:
        """Token ids of text that a user might write."""
        return self.tokenizer.encode(text, add_special_tokens=False, allow_special=False)

    def beginning(self, text: str) -> list[int]:
        """Token ids of a plain text's beginning, with what the model wants before a text."""
        ids = self.tokenizer.encode(text, add_special_tokens=True, allow_special=False)
        if ids:
            return ids
        bos = self.tokenizer.special_tokens.get("bos_token")
        return [] if bos is None else self.tokenizer.encode(bos, add_special_tokens=False)

    def _find(self, turn: int) -> tuple[list[int], list[int]]:
        assert self.template is not None
        marks = [f"qzx{i}xzq" for i in range(2 * turn + 1)]
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": mark} for i, mark in enumerate(marks)]
        rendered = self.template.render(messages, add_generation_prompt=True)
        before, found, after = rendered.rpartition(marks[-1])
        if turn:
            _, last, before = before.rpartition(marks[-2])
            found = found and last
        if not found:
            raise ChatTemplateError("the model's chat template does not show messages as they are written")
        return self._encode(before), self._encode(after)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
