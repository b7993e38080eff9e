"""How a judge is asked over a network: one engine, the routes in front of it, and a page."""
