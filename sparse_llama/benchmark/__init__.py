"""How fast, and how near to the limit: measurements that others can repeat."""
