"""What the ranks of a server are to each other: news of all, streams handed over, and places of the dead given anew."""
