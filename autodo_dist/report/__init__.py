"""What a run has learnt, as one page: facts and pictures are gathered, charts drawn, and a template filled."""
