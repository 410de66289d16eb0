"""Problems and how they become prompts."""
