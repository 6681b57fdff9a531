"""The expressivity lab: small tasks that tell the mixers apart."""
