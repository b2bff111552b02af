"""Fifty beginnings of text, of different kinds and lengths, for comparisons with another implementation."""

from __future__ import annotations

_TOPICS = (
    "The history of bread begins",
    "In a small village by the sea, there lived",
    "The most important property of water is",
    "def fibonacci(n):\n    ",
    "Dear Sir or Madam,\nI am writing to",
    "Q: What is the boiling point of water?\nA:",
    "1, 1, 2, 3, 5, 8,",
    "The recipe needs two cups of flour,",
    "On the first day of winter, the children",
    "A triangle has three sides and",
    "Once upon a time, a fox and a crow",
    "The train to London was late, so",
    "To install the package, run",
    "Photosynthesis is the process by which",
    "Roses are red, violets are",
    "The capital of Spain is",
    "My favourite book is about",
    "An electron is smaller than",
    "SELECT name FROM users WHERE",
    "The doctor looked at the chart and said",
    "If it rains tomorrow, we will",
    "Mount Everest is located in",
    "The first computer programs were",
    "She opened the letter slowly and",
    "Bees communicate with each other by",
)
_STYLES = ("", "Here is a short and simple explanation for a young reader. ")

PROMPTS: tuple[str, ...] = tuple(style + topic for style in _STYLES for topic in _TOPICS)
