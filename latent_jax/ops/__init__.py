"""Operations whose implementation the platform decides, each behind one signature."""
