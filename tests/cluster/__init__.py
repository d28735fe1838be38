"""Whole clusters: `ray up` on hosts that are network namespaces."""
