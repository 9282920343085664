#!/usr/bin/env python3
"""The demo: steps on real servers, each checked as it is shown, and both sides compared row by row at the end.

    demo.py TEMPLATE    the folder that scripts/tryton/template.sh prints; run by scripts/demo.sh
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).parent))
import compare  # noqa: E402
from world import ROOT, Failed, Refused, World, equal, say, wait_for  # noqa: E402


def step(number, title):
    say(f"\n\033[1m{number}. {title}\033[0m" if sys.stdout.isatty() else f"\n{number}. {title}")


def fact(text):
    say(f"   {text}")


def check(condition, what):
    if not condition:
        raise Failed(what)


def link(world, system, object, table, key):
    """The external id that a row is linked to, or None."""
    found = world.rows(
        "SELECT external_id FROM tidegate.links WHERE system = %s AND object = %s AND table_name = %s AND local_key->>'id' = %s",
        (system, object, f"public.{table}", str(key)))
    return found[0][0] if found else None


def settled(world):
    """True when every connector has read all there is."""
    report = world.status()
    return report and all(not connector["lag_events"] for connector in report["connectors"])


def arrived(world):
    """For `wait_for`: every customer and placed order of the shop is in ERP and CRM as it is here."""
    erp, crm = world.tryton("erp"), world.tryton("crm")
    return equal(lambda: [*compare.customers(world, erp, crm), *compare.orders(world, erp)])


def write_order(connection, number, customer, lines):
    """What the shop's application does when an order is placed, in the caller's transaction."""
    order = connection.execute(
        "INSERT INTO orders (number, customer_id, status, placed_at) VALUES (%s, %s, 'placed', now()) RETURNING id",
        (number, customer)).fetchone()[0]
    for sku, quantity in lines:
        connection.execute(
            "INSERT INTO order_lines (order_id, product_id, quantity, price) SELECT %s, id, %s, price FROM products WHERE sku = %s",
            (order, quantity, sku))
    return order


def add_customer(connection, email, name):
    return connection.execute(
        "INSERT INTO customers (email, name, street, postal_code, city) VALUES (%s, %s, 'Speicherweg 4', '20457', 'Hamburg')"
        " RETURNING id", (email, name)).fetchone()[0]


def products_come_up(world):
    step(1, "Products and stock come up from the ERP")
    before = world.rows("SELECT id, sku, name, price FROM products WHERE sku = 'MUG-01'")[0]
    fact(f"the shop lists 24 products by hand, among them {before[1]} {before[2]!r} at {before[3]}")

    erp = world.tryton("erp")
    _, seconds = wait_for("the ERP's products and stock in the shop", 90, equal(lambda: compare.catalogue(world, erp)))
    count, stock = world.rows("SELECT count(*), (SELECT sum(on_hand) FROM inventory) FROM products")[0]
    after = world.rows("SELECT id, sku, name, price FROM products WHERE sku = 'MUG-01'")[0]
    check(before[0] == after[0], "the row that was listed was paired, not made anew")
    fact(f"{count} products and {stock} pieces in stock are in the datastore {seconds:.1f} s later: {count - 24} created, 24 paired")
    fact(f"row {after[0]} is now {after[1]} {after[2]!r} at {after[3]}, linked to product "
         f"{link(world, 'erp', 'product', 'products', after[0])} of the ERP")


def first_delivery(world):
    fact("meanwhile the rows that were there go down:")
    _, seconds = wait_for("every customer and order in the ERP, customers in the CRM", 240, arrived(world))
    (customers,), (orders,) = world.rows(
        "SELECT count(*) FROM customers UNION ALL SELECT count(*) FROM orders WHERE placed_at IS NOT NULL")
    fact(f"{customers} customers in ERP and CRM, {orders} orders quoted as sales, after {seconds:.1f} s more "
         f"({len(world.requests('erp'))} writing requests to the ERP, {len(world.requests('crm'))} to the CRM)")


def an_order_goes_down(world):
    step(2, "A customer and an order are written in the datastore")
    started = time.monotonic()
    with world.connect(role="shop") as connection, connection.transaction():
        customer = add_customer(connection, "mette.lund@example.com", "Mette Lund")
        order = write_order(connection, "WEB-20001", customer, [("MUG-01", 6), ("KTL-02", 1)])
    fact(f"one transaction: customer {customer}, order WEB-20001 ({order}) with two lines")
    erp = world.tryton("erp")

    def sale():
        found = erp.search("sale.sale", [["reference", "=", "WEB-20001"], ["state", "=", "quotation"]],
                           ["party", "total_amount", "lines"])
        return found and found[0]
    found, _ = wait_for("the sale in the ERP", 60, sale)
    fact(f"{time.monotonic() - started:.1f} s later the ERP has party {found['party']} and, quoted, sale {found['id']} "
         f"with {len(found['lines'])} lines, {found['total_amount']['decimal']} EUR in all")

    def linked():
        party = link(world, "erp", "party", "customers", customer)
        return party == str(found["party"]) and link(world, "erp", "sale", "orders", order) == str(found["id"])
    wait_for("the links in the datastore", 20, linked)
    fact(f"links: customer {customer} = party {found['party']}, order WEB-20001 = sale {found['id']}")
    return order, found["id"], customer, found["party"]


def a_status_comes_back(world, order, sale):
    step(3, "A person confirms the sale in the ERP")
    erp = world.tryton("erp")
    started = time.monotonic()
    erp.call("model.sale.sale.confirm", [sale])
    state = erp.search("sale.sale", [["id", "=", sale]], ["state"])[0]["state"]
    fact(f"sale {sale} is {state} in the ERP")
    wait_for("the status in the datastore", 30, lambda: world.rows(
        "SELECT 1 FROM orders WHERE id = %s AND status = %s::order_status", (order, state)))
    fact(f"order WEB-20001 is {state} in the datastore {time.monotonic() - started:.1f} s later")


def no_echo(world, customer, party):
    step(4, "A customer is changed in the ERP")
    erp, crm = world.tryton("erp"), world.tryton("crm")
    wait_for("nothing in flight", 60, lambda: settled(world))
    writes, writes_crm = len(world.requests("erp")), len(world.requests("crm"))
    started = time.monotonic()
    mail = erp.search("party.contact_mechanism", [["party", "=", party], ["type", "=", "email"]])[0]["id"]
    erp.write("party.party", [party], {"name": "Mette Lund-Krogh", "contact_mechanisms": [
        ["write", [mail], {"value": "mette.krogh@example.com"}]]})
    want = ("Mette Lund-Krogh", "mette.krogh@example.com")
    wait_for("the change in the datastore", 30, lambda: world.rows(
        "SELECT name, email FROM customers WHERE id = %s", (customer,)) == [want])
    fact(f"party {party} is now {want[0]}, {want[1]}; the datastore has it {time.monotonic() - started:.1f} s later")

    def in_crm():
        found = crm.search("party.party", [["code", "=", f"C{customer}"]], ["name", "email"])
        return found and (found[0]["name"], found[0]["email"]) == want
    wait_for("the change in the CRM", 30, in_crm)
    fact(f"the CRM has it {time.monotonic() - started:.1f} s after the change")
    wait_for("nothing in flight", 60, lambda: settled(world))
    pulls = len(world.requests("erp", ("GET",)))
    wait_for("three more rounds of the pulls", 60, lambda: len(world.requests("erp", ("GET",))) >= pulls + 9)
    echoed, told = world.requests("erp", since=writes), world.requests("crm", since=writes_crm)
    check(not echoed, f"echoed to the ERP: {echoed}")
    check(len(told) == 1, f"one request told the CRM; there were {told}")
    fact(f"writing requests since then: ERP 0 (no echo), CRM 1 ({told[0][0]} {told[0][1]})")


def an_outage(world):
    step(5, "The ERP is stopped, changes are made, the ERP is started")
    posts = len(world.requests("erp", ("POST",)))
    world.kill("tryton", signal.SIGKILL)
    started = time.monotonic()
    with world.connect(role="shop") as connection:
        new = []
        for number in range(1, 6):
            with connection.transaction():
                new.append(add_customer(connection, f"outage{number}@example.com", f"Otto Ausfall {number}"))
                write_order(connection, f"WEB-3000{number}", new[-1], [("TEA-01", number), ("SLT-01", 1)])
        for version in range(1, 11):
            connection.execute("UPDATE customers SET name = %s WHERE id = 1", (f"Anna Möller, version {version}",))
        connection.execute("UPDATE customers SET street = 'Neuer Wall 1', postal_code = '20354' WHERE id BETWEEN 2 AND 20")
        connection.execute("UPDATE orders SET placed_at = now(), status = 'placed' WHERE number = 'WEB-10010'")
    fact("written while it is down: 5 customers, each with an order; 10 changes of customer 1; 19 addresses; a cart placed")

    def held():
        report = world.status()
        return report and next((system for system in report["systems"]
                                if system["name"] == "erp" and system["breaker"].lower() != "closed"), None)
    system, seconds = wait_for("the breaker of the ERP", 60, held)
    report, _ = wait_for("the worker's status", 20, world.status)
    waiting = sorted(connector["name"] for connector in report["connectors"] if connector["state"] == "WAITING")
    fact(f"the breaker is {system['breaker'].lower()} after {seconds:.1f} s; waiting: {', '.join(waiting) or 'none'}")
    time.sleep(max(0, 5 - (time.monotonic() - started)))
    world.start_tryton()
    up = time.monotonic()
    fact(f"the ERP is up again after {up - started:.1f} s")
    wait_for("everything written meanwhile in ERP and CRM", 120, arrived(world))
    erp = world.tryton("erp")
    created = [path for method, path, status in world.requests("erp", ("POST",), since=posts) if status == 200]
    parties = sum(path.split("?")[0] == "party.party" for path in created)
    sales = sum(path.split("?")[0] == "sale.sale" for path in created)
    check((parties, sales) == (5, 6), f"5 parties and 6 sales are created once; there were {parties} and {sales}: {created}")
    last = erp.search("party.party", [["code", "=", "C1"]], ["name"])[0]["name"]
    fact(f"all of it arrived {time.monotonic() - up:.1f} s later, once: {parties} parties and {sales} sales created, customer 1 is {last!r}")


def topics_and_a_dead_letter(world):
    step(6, "The topics, the lag, and a record that the ERP refuses")
    events = world.tidegate("consume", "shop.public.customers", "--from", "beginning")
    kinds = {}
    for event in events:
        kind = (event["value"] or {}).get("op", "tombstone")
        kinds[kind] = kinds.get(kind, 0) + 1
    check(len(events) >= 126 + 30, f"{len(events)} events of customers")
    fact(f"tidegate consume shop.public.customers: {len(events)} events ({', '.join(f'{n} {k}' for k, n in sorted(kinds.items()))})")
    folded = {}
    for event in events:
        folded[str(event["key"]["id"])] = (event["value"] or {}).get("after")
    names = {key: after["name"] for key, after in folded.items() if after}
    check(names == {str(id): name for id, name in world.rows("SELECT id, name FROM customers")},
          "the topic folded by key is the table")
    fact("folded by key they are the table, row by row")
    wait_for("nothing in flight", 60, lambda: settled(world))
    report, _ = wait_for("the worker's status", 20, world.status)
    for connector in report["connectors"]:
        lag = [f"{connector[name]} {unit}" for name, unit in (("lag_events", "events"), ("lag_bytes", "bytes"))
               if connector[name] is not None]
        fact(f"  {connector['name']:<17}{connector['state']:<9}lag {', '.join(lag) or 'none':<20}{connector['applied']} applied")

    with world.connect(role="shop") as connection, connection.transaction():
        order = write_order(connection, "WEB-40001", 7, [("KNF-01", "2.5")])
        good = write_order(connection, "WEB-40002", 7, [("KNF-02", 1)])
    fact("order WEB-40001 asks for 2.5 knives, which the ERP refuses; WEB-40002 is a good one")

    def letters(*kinds):
        found = world.tidegate("dead-letters", "list", "erp-orders")[0]
        return [letter for letter in found if letter["kind"] in kinds]
    found, seconds = wait_for("the dead letter", 30, lambda: letters("rejected"))
    letter = found[0]
    fact(f"tidegate dead-letters list, {seconds:.1f} s later: {letter['id']}: {letter['reason'][:160]}…")
    shown = world.tidegate("dead-letters", "show", "erp-orders", letter["id"])[0]
    fact(f"dead-letters show has the request and the answer: {shown['request']['request']}, "
         f"{shown['response']['status']}")
    erp = world.tryton("erp")
    quoted = lambda reference: lambda: erp.search(  # noqa: E731
        "sale.sale", [["reference", "=", reference], ["state", "=", "quotation"]])
    wait_for("the good order in the ERP", 30, quoted("WEB-40002"))
    fact("the good order went on to the ERP meanwhile")
    check(not quoted("WEB-40001")(), "the bad order is not in the ERP")
    world.tidegate("dead-letters", "replay", "erp-orders", "--all")
    wait_for("the replay", 30, lambda: any(letter["attempts"] > 1 for letter in letters("rejected")))
    fact("tidegate dead-letters replay, as it is: refused again")
    with world.connect(role="shop") as connection:
        connection.execute("UPDATE order_lines SET quantity = 3 WHERE order_id = %s", (order,))
    sale, seconds = wait_for("the mended order in the ERP", 30, quoted("WEB-40001"))
    wait_for("no dead letter left", 30, lambda: not letters("rejected", "behind"))
    fact(f"mended to 3, which is tried in its place: sale {sale[0]['id']} {seconds:.1f} s later; no dead letter is left")
    check(good != order, "two orders")


def both_sides(world):
    step(7, "Both sides, row by row")
    wait_for("nothing in flight", 60, lambda: settled(world))
    results, _ = None, None
    deadline = time.monotonic() + 30
    while True:
        results = compare.everything(world)
        if not any(differences for _, _, differences in results) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    for what, rows, differences in results:
        fact(f"{what:<34}{rows:>5} rows  {'equal' if not differences else f'{len(differences)} DIFFER'}")
        for line in differences[:5]:
            fact(f"    {line}")
    check(not any(differences for _, _, differences in results), "the sides differ")


def look_further(world, keep):
    say("\nLook further:")
    if not keep:
        say("   make demo KEEP=1      leaves everything running, and says how to reach it")
        say("   make demo LOG=kafka   does the same on a Kafka broker")
        return
    say(f"   . {world.dir}/env    # then, anywhere:")
    for line in ("tidegate status --watch", "tidegate consume shop.public.orders --follow", "tidegate preview erp-customers",
                 "tidegate dead-letters list"):
        say(f"   {line}")
    say(f"   psql -h 127.0.0.1 -p {world.ports['postgresql']} -U postgres shop")
    say('   curl -H "Authorization: Bearer $ERP_KEY" "$ERP_URL/party.party?s=3"   # the CRM: $CRM_KEY, $CRM_URL')
    say(f"   {world.tryton_address()} in a Tryton client: databases erp and crm, user admin, password admin")
    say(f"   curl http://127.0.0.1:{world.ports['tidegate']}/metrics")
    ids = " ".join(str(process.pid) for process in world.processes.values())
    kafka = f"; {ROOT}/scripts/kafka.sh stop {world.dir}/kafka" if "kafka" in world.started else ""
    say(f"   stop it:  kill {ids}{kafka}; {ROOT}/scripts/postgresql.sh stop {world.dir}/pg; rm -rf {world.dir}")


def main(template):
    log, keep = os.environ.get("LOG") or "embedded", os.environ.get("KEEP") not in (None, "", "0")
    check(log in ("embedded", "kafka"), f"LOG={log}: it is embedded or kafka")
    # A terminated demo ends its servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    world = World(template, log)
    fine = False
    try:
        world.start_postgresql()
        world.start_tryton()
        if log == "kafka":
            world.start_kafka()
        counts = world.rows("SELECT (SELECT count(*) FROM customers), (SELECT count(*) FROM products), "
                            "(SELECT count(*) FROM orders), (SELECT count(*) FROM order_lines)")[0]
        say(f"PostgreSQL with the shop ({counts[0]} customers, {counts[1]} products, {counts[2]} orders, {counts[3]} lines), "
            f"Tryton 8.2 as ERP and CRM, log: {log}")
        world.start_tidegate()
        wait_for("the worker", 30, world.status)
        say(f"tidegate run with {len(list((ROOT / 'connectors').glob('*.yaml')))} connectors; {time.monotonic() - started:.0f} s so far")
        products_come_up(world)
        first_delivery(world)
        order, sale, customer, party = an_order_goes_down(world)
        a_status_comes_back(world, order, sale)
        no_echo(world, customer, party)
        an_outage(world)
        topics_and_a_dead_letter(world)
        both_sides(world)
        if not keep:
            code = world.kill("tidegate")
            check(code == 0, f"tidegate ended with {code} after SIGTERM:\n{world.log_end('tidegate')}")
            fact("tidegate drained and stopped on SIGTERM")
        say(f"\nAll is equal, after {time.monotonic() - started:.0f} s.")
        look_further(world, keep)
        fine = True
    except KeyboardInterrupt:
        say("\nInterrupted.")
    except Exception as failed:
        known = isinstance(failed, (Failed, Refused, AssertionError, OSError, subprocess.SubprocessError, psycopg.Error))
        say(f"\nFAILED: {failed if known else traceback.format_exc()}")
        say(f"\nThe worker says:\n{world.status_text()}")
        say(f"\nThe end of its log:\n{world.log_end('tidegate')}")
    finally:
        if not (fine and keep):
            logs = os.environ.get("DEMO_LOGS") or (None if fine else tempfile.mkdtemp(prefix="tidegate-demo-logs-"))
            world.end(logs)
            if logs:
                say(f"\nThe logs of all servers are in {logs}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
