"""What is asked of documents: a question, a column of them, or a summary."""

from __future__ import annotations

# what the model is asked for, by the word of --summarise
SUMMARIES = {
    "short": "Summarise this document in a few sentences.",
    "page": "Summarise this document on one page: what it is about, its main points, and what follows from "
    "them.",
    "detailed": "Summarise this document in detail, section by section, with the names, figures and dates "
    "that matter.",
}
SUMMARY_TOKENS = 512  # longest summary, and longest part of one, unless --max-new-tokens says otherwise
ANSWER_TOKENS = 128  # longest answer to a question

# of these settings one at most is given
ASKED = ("question", "question_column", "questions_column", "summarise")
