"""Answers to prefilled prompts: the batch that is decoded, how tokens are chosen, and where answers end."""
