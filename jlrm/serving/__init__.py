"""How a judge is asked by others: from Python, and by files of pairs."""
