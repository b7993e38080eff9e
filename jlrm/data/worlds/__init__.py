"""Data that needs no download: small worlds in which the right judgement is known for certain."""
