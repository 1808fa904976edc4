"""Planning: every input read once, records listed, unique sequences dealt to shard groups."""
