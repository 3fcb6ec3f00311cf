"""How the tokens of a round are chosen from logits."""
