"""What a run is: one strict JSON document and the flags that override it. Never imports torch."""
