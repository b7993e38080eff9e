"""Who answers: each module makes a `Backend` (evaluation/games.py) that can be asked."""
