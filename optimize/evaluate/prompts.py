"""Questions for both models: short ones of many kinds."""

from __future__ import annotations

from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer

PROMPTS = (
    "Why does bread rise in the oven?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List five rivers of Africa and the countries they cross.",
    "Translate into French: The library closes at seven.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it travel?",
    "Summarize in one sentence: Bees visit flowers for nectar and carry pollen from one to the next.",
    "Write a short poem about the first snow.",
    "Explain the difference between a list and a tuple.",
    "What is the boiling point of water on a high mountain, and why?",
    "Give three reasons to keep a diary.",
    "Correct the mistakes: She don't has no time yesterday.",
    "Who painted The Starry Night, and where does it hang today?",
    "Write an SQL query that counts the orders of each customer.",
    "Continue the story: The lighthouse keeper found a letter under the door.",
    "Compare cats and dogs as pets in a table.",
    "Is 221 a prime number? Show your steps.",
)


def prompt_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of every prompt, through the model's chat template where it has one. Raises ChatTemplateError."""
    source = tokenizer.chat_template
    if source is None:
        return [tokenizer.encode(prompt, add_special_tokens=True) for prompt in PROMPTS]
    template = ChatTemplate(source, tokenizer.special_tokens)
    texts = [template.render([{"role": "user", "content": prompt}], add_generation_prompt=True) for prompt in PROMPTS]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
