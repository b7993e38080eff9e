"""What a judgement is as text: prompts, the parser of verdicts, and the reward. Pure Python."""
