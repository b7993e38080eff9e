"""How good is a judge: games, readers, policies and scoring rules, intervals, results."""
