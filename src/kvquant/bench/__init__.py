"""``kvquant bench``: this machine's decode, store and prompt beside torch's attention."""
