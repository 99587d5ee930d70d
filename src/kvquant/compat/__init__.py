"""Names and switches of other projects, so that their code and documentation work with kvquant."""
