"""How good is a judge: games, readers, policies, scoring rules."""
