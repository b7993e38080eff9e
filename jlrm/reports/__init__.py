"""What people read: pages, charts, tables, logs and model cards."""
