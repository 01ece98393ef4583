"""The base model: found, loaded strictly, adapted, checked."""
