"""What grammars do to the drafts of a round and to their verification."""
