-- The shop of the demo: the datastore that an application would write. Always the same rows.
-- Run it in an empty database as its superuser; roles are made where missing.

DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'shop') THEN
        CREATE ROLE shop LOGIN PASSWORD 'shop';                      -- the application
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'tidegate') THEN
        CREATE ROLE tidegate LOGIN REPLICATION PASSWORD 'tidegate';
    END IF;
END $$;
-- A publication takes a table only from its owner, whose rights Tidegate is given; and it keeps its own schema.
GRANT shop TO tidegate;
DO $$ BEGIN EXECUTE format('GRANT CREATE ON DATABASE %I TO shop, tidegate', current_database()); END $$;
GRANT CREATE ON SCHEMA public TO shop;

SET ROLE shop;

CREATE TYPE order_status AS ENUM ('cart', 'placed', 'quoted', 'confirmed', 'processing', 'done', 'cancelled');

CREATE TABLE customers (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    email        text NOT NULL UNIQUE,
    name         text NOT NULL,
    street       text NOT NULL,
    postal_code  text NOT NULL,
    city         text NOT NULL,
    newsletter   boolean NOT NULL DEFAULT false,
    preferences  jsonb NOT NULL DEFAULT '{}',
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE products (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sku         text NOT NULL UNIQUE,
    name        text NOT NULL,
    price       numeric(12,2) NOT NULL CHECK (price >= 0),
    description text,
    tags        text[] NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE inventory (
    product_id  bigint PRIMARY KEY REFERENCES products ON DELETE CASCADE,
    on_hand     integer NOT NULL DEFAULT 0,
    updated_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE orders (
    id          uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    number      text NOT NULL UNIQUE,
    customer_id bigint NOT NULL REFERENCES customers,
    status      order_status NOT NULL DEFAULT 'cart',
    note        text,
    placed_at   timestamptz,                                          -- null while it is a cart
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE order_lines (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id    uuid NOT NULL REFERENCES orders ON DELETE CASCADE,
    product_id  bigint NOT NULL REFERENCES products,
    quantity    numeric(10,3) NOT NULL CHECK (quantity > 0),
    price       numeric(12,2) NOT NULL
);
CREATE INDEX ON order_lines (order_id);
CREATE INDEX ON orders (customer_id);

-- A trigger of the application's own, as real datastores have them.
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END $$;
CREATE TRIGGER touch BEFORE UPDATE ON customers FOR EACH ROW EXECUTE FUNCTION touch();
CREATE TRIGGER touch BEFORE UPDATE ON products FOR EACH ROW EXECUTE FUNCTION touch();
CREATE TRIGGER touch BEFORE UPDATE ON inventory FOR EACH ROW EXECUTE FUNCTION touch();
CREATE TRIGGER touch BEFORE UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION touch();

-- 120 customers.
INSERT INTO customers (email, name, street, postal_code, city, newsletter, preferences, created_at)
SELECT lower(translate(first || '.' || last, 'äöüéøå', 'aoueoa')) || n || '@example.com',
       first || ' ' || last,
       (ARRAY['Hafenstraße', 'Birkenweg', 'Marktplatz', 'Lindenallee', 'Am Deich', 'Kirchgasse'])[1 + n % 6] || ' ' || 1 + n * 7 % 89,
       lpad((10115 + n * 613 % 80000)::text, 5, '0'),
       (ARRAY['Hamburg', 'Kiel', 'Bremen', 'Lübeck', 'Rostock', 'Husum', 'Flensburg', 'Cuxhaven'])[1 + n % 8],
       n % 3 = 0,
       jsonb_build_object('language', (ARRAY['de', 'en', 'da'])[1 + n % 3], 'size', n % 5),
       timestamptz '2026-01-04 09:00Z' + n * interval '61 hours 13 minutes'
FROM generate_series(1, 120) AS n,
     LATERAL (SELECT (ARRAY['Jürgen', 'Anna', 'Malte', 'Ida', 'Søren', 'Clara', 'Finn', 'Käthe', 'Emil', 'Zoé'])[1 + n % 10] AS first,
                     (ARRAY['Petersen', 'Möller', 'Hansen', 'Schröder', 'Nielsen', 'Ahlers', 'Brandt'])[1 + n % 7] AS last) AS names;

-- 24 of the ERP's 60 products are listed already, by hand: old prices, no stock yet.
INSERT INTO products (sku, name, price, description, tags)
SELECT sku, name, price, 'Listed by hand before the ERP was connected.', ARRAY['legacy', split_part(sku, '-', 1)]
FROM (VALUES
    ('BLK-01', 'Wool Blanket Fjord', 119.00), ('BLK-02', 'Wool Blanket Dune', 119.00), ('TWL-01', 'Linen Towel Sand', 22.00),
    ('TWL-02', 'Linen Towel Indigo', 22.00), ('TWL-03', 'Linen Towel Moss', 22.00), ('MUG-01', 'Mug speckled', 16.50),
    ('MUG-02', 'Mug celadon', 16.50), ('MUG-03', 'Mug ink', 16.50), ('MUG-04', 'Mug chalk', 16.50),
    ('PLT-01', 'Plate speckled', 24.90), ('PLT-02', 'Plate celadon', 24.90), ('BWL-01', 'Bowl speckled', 19.90),
    ('BRD-01', 'Cutting board S', 35.00), ('BRD-02', 'Cutting board M', 39.00), ('PAN-01', 'Pan 20', 59.00),
    ('PAN-02', 'Pan 24', 64.00), ('KNF-02', 'Chef''s knife 20', 85.00), ('LMP-01', 'Brass desk lamp', 139.00),
    ('CND-01', 'Beeswax pillar', 12.00), ('BSK-01', 'Round basket', 44.00), ('APR-01', 'Apron natural', 29.00),
    ('KTL-01', 'Kettle cream', 55.00), ('TEA-01', 'Tea caddy 100', 15.00), ('GRD-01', 'Hand grinder', 69.00)
) AS listed (sku, name, price);

-- 60 orders of one to four lines; every tenth is still a cart.
INSERT INTO orders (id, number, customer_id, status, note, placed_at, created_at)
SELECT md5('order ' || n)::uuid, 'WEB-' || 10000 + n, 1 + n * 17 % 120,
       CASE WHEN n % 10 = 0 THEN 'cart' ELSE 'placed' END::order_status,
       CASE WHEN n % 8 = 0 THEN 'Please leave it with the neighbours.' END,
       CASE WHEN n % 10 <> 0 THEN at END, at - interval '11 minutes'
FROM generate_series(1, 60) AS n, LATERAL (SELECT timestamptz '2026-10-02 07:30Z' + n * interval '9 hours 41 minutes' AS at) AS times;

INSERT INTO order_lines (order_id, product_id, quantity, price)
SELECT md5('order ' || n)::uuid, product.id, 1 + (n + line) % 3, product.price
FROM generate_series(1, 60) AS n, LATERAL generate_series(1, 1 + n % 4) AS line,
     LATERAL (SELECT id, price FROM products WHERE id = 1 + (n * 5 + line * 7) % 24) AS product;

RESET ROLE;
